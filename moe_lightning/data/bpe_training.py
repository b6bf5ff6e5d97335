"""The program that learns a byte-level BPE: a process of its own, for the library's training cannot be interrupted.

It reads {"texts", "vocab_size"} as JSON and writes the tokenizer's. It imports no more than `tokenizers`, so that it
starts in no time.
"""

import ctypes
import json
import random
import signal
import sys
from collections.abc import Iterator

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

END_OF_TEXT = "<|endoftext|>"
#: A longer run without a boundary is cut, for a merge goes through every word that has the pair, from end to end:
#: in one line of 1 MB without a space this would be quadratic. Tokens are at most as long.
LONGEST_WORD_BYTES = 64
#: Text with more different words than this is left off there; memory and time of the training go by these.
DISTINCT_BYTES = 4 << 20

_PR_SET_PDEATHSIG = 1
_ALNUM = bytes(code for code in range(256) if code >= 128 or chr(code).isalnum())
_OTHER = bytes(code for code in range(256) if code not in _ALNUM)
_ALNUM_TO_SPACE = bytes.maketrans(_ALNUM, b" " * len(_ALNUM))
_OTHER_TO_SPACE = bytes.maketrans(_OTHER, b" " * len(_OTHER))


def learn(texts: list[str], vocab_size: int) -> str:
    """The JSON of a `tokenizers.Tokenizer` of at most ``vocab_size`` tokens; the same texts give the same."""
    model = tokenizers.Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.ByteLevel(add_prefix_space=False), pre_tokenizers.FixedLength(LONGEST_WORD_BYTES)]
    )
    model.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    model.train_from_iterator(_until_distinct(texts), trainer)
    return model.to_str()


def _until_distinct(texts: list[str]) -> Iterator[str]:
    """The texts in an order of chance, which is always the same, until they have DISTINCT_BYTES of different words."""
    texts = random.Random(0).sample(texts, len(texts))
    words: set[bytes] = set()
    size = 0
    for text in texts:
        yield text
        content = text.encode()
        new = {*content.translate(_OTHER_TO_SPACE).split(), *content.translate(_ALNUM_TO_SPACE).split()} - words
        size += sum(map(len, new))
        if size > DISTINCT_BYTES:
            return
        words |= new


if __name__ == "__main__":
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    job = json.load(sys.stdin)
    sys.stdout.write(learn(**job))
