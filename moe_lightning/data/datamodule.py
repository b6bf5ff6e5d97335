"""The text of a run as a LightningDataModule."""

import os
from collections.abc import Iterable
from typing import Literal

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn
from typing_extensions import override

from moe_lightning.data.loaders import EvalLoader, PromptLoader, TrainLoader, Windows
from moe_lightning.data.prepare import PreparedText, prepare_text
from moe_lightning.data.tokenizer import SMALLEST_VOCAB, ByteTokenizer, Tokenizer, load_tokenizer
from moe_lightning.utils.checks import check_choice, check_int

BPE_VOCAB = 4096
LARGEST_VOCAB = 1 << 20
LARGEST_WORKERS = 64  # a typo must not fork a thousand processes


def check_text(name: str, value: object) -> None:
    """Raise ValueError unless ``value`` is a string with something in it that a path can have."""
    if not isinstance(value, str) or not value.strip() or "\0" in value:
        raise ValueError(f"data: {name} must be a non-empty string, got {value!r} ({type(value).__name__})")


def check_prompts(value: object) -> list[str]:
    """Return the prompts as a list; ValueError unless a string or a non-empty list of strings, all of them Unicode."""
    prompts = [value] if isinstance(value, str) else value
    if not isinstance(prompts, list) or not prompts or not all(isinstance(text, str) for text in prompts):
        raise ValueError(f"data: prompt must be a string or a non-empty list of strings, got {value!r}")
    for text in prompts:
        if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
            # Bytes of the command line that are not UTF-8 come as half surrogates.
            raise ValueError(f"data: prompt must be UTF-8 text, got {text!r}; convert it")
    return prompts


def check_vocab(tokenizer: object, vocab_size: int | None) -> int:
    """Return the size of the vocabulary; ValueError for an unknown tokenizer or a size it cannot have."""
    check_choice("data", "tokenizer", tokenizer, ("bytes", "bpe"))
    if vocab_size is None:
        return ByteTokenizer.vocab_size if tokenizer == "bytes" else BPE_VOCAB
    check_int("data", "vocab_size", vocab_size, SMALLEST_VOCAB, LARGEST_VOCAB)
    if tokenizer == "bytes" and vocab_size != ByteTokenizer.vocab_size:
        raise ValueError(f"data: vocab_size must be 257 with tokenizer='bytes', got {vocab_size}; leave it out")
    return vocab_size


#: Arguments that are none of a run's hyperparameters, but for vocab_size, which the model's is made from.
_NOT_LOGGED = ("vocab_size", "cache_dir", "prompt", "num_workers")


class TextDataModule(L.LightningDataModule):
    """Real text, tokenised once, in batches of int64 tokens (batch_size, seq_len + 1).

    The tokenizer is stored in the checkpoint and comes back from it: ``predict`` never reads the corpus, and
    a model is always evaluated with the tokens it was trained on. The place in the data is stored too. A second fit
    goes on where the first one stopped, unless it resumes from a checkpoint; for the same batches again make another
    datamodule.

    Args:
        path: a UTF-8 file, a folder (its text files) or a glob; None is the source of Python's standard library.
        tokenizer: "bytes", or "bpe": a byte-level BPE trained on the train split.
        vocab_size: tokens of the BPE (None: 4096); bytes always have 257.
        seq_len: tokens a sequence is trained on.
        batch_size: sequences in a batch on each device.
        max_val_tokens: validation and test read this many tokens at most, spread over the split; None: all.
        seed: of the shuffling.
        cache_dir: where the tokens are kept; safe to delete.
        prompt: what ``predict`` continues; one text or several.
        num_workers: processes that read batches; a batch takes microseconds, so 0 is rarely worth changing.

    Raises:
        ValueError: an argument is out of range; before any file is read.
    """

    def __init__(
        self,
        path: str | None = None,
        tokenizer: Literal["bytes", "bpe"] = "bytes",
        vocab_size: int | None = None,
        seq_len: int = 256,
        batch_size: int = 16,
        max_val_tokens: int | None = 131_072,
        seed: int = 0,
        cache_dir: str = ".cache/moe_lightning",
        prompt: str | list[str] = "def ",
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        # Plain strings are kept: a Path in a checkpoint could not be loaded with weights_only=True.
        path = os.fspath(path) if isinstance(path, os.PathLike) else path
        cache_dir = os.fspath(cache_dir) if isinstance(cache_dir, os.PathLike) else cache_dir
        if path is not None:
            check_text("path", path)
        check_text("cache_dir", cache_dir)
        check_int("data", "seq_len", seq_len, 1)
        check_int("data", "batch_size", batch_size, 1)
        check_int("data", "seed", seed, 0)
        check_int("data", "num_workers", num_workers, 0, LARGEST_WORKERS)
        if max_val_tokens is not None:
            check_int("data", "max_val_tokens", max_val_tokens, 1)
        self._vocab_size = check_vocab(tokenizer, vocab_size)
        self._prompts = check_prompts(prompt)
        self.save_hyperparameters(ignore=["_instantiator", *_NOT_LOGGED])
        # Set after the logged ones: Lightning refuses a model and a datamodule that log vocab_size with two values.
        self.hparams.update(vocab_size=vocab_size, cache_dir=cache_dir, prompt=prompt, num_workers=num_workers)
        self._path = path
        self._kind = tokenizer
        self._seq_len = seq_len
        self._max_val_tokens = max_val_tokens
        self._seed = seed
        self._cache_dir = cache_dir
        self._num_workers = num_workers
        self._tokenizer: Tokenizer | None = ByteTokenizer() if tokenizer == "bytes" else None
        self._text: PreparedText | None = None
        self._train_loader: TrainLoader | EvalLoader | None = None
        self._loader_batch_size = batch_size  # what it was made with

    @property
    def batch_size(self) -> int:
        """Sequences in a batch; Lightning's batch-size finder sets it here or in `hparams`."""
        return self.hparams["batch_size"]

    @batch_size.setter
    def batch_size(self, value: int) -> None:
        check_int("data", "batch_size", value, 1)
        self.hparams["batch_size"] = value

    @property
    def vocab_size(self) -> int:
        """How many ids the model needs; known before any data is read."""
        return self._vocab_size if self._tokenizer is None else self._tokenizer.vocab_size

    @property
    def eos_id(self) -> int:
        """The token that ends a document."""
        return self._known_tokenizer().eos_id

    @override
    def prepare_data(self) -> None:
        """Tokenise the corpus unless the cache has it; one process of each machine does the work."""
        if not self._predicting():
            self._prepared()

    @override
    def setup(self, stage: str) -> None:
        """Open the tokens; raises an error now if there is too little text to train on."""
        if not self._predicting():
            self._prepared()
        if stage == TrainerFn.FITTING:
            self._train_loader = self._new_train_loader()

    @override
    def train_dataloader(self) -> TrainLoader | EvalLoader:
        """Shuffled batches of the train split; with ``overfit_batches`` the same ones in every epoch."""
        if self._train_loader is None or self._loader_batch_size != self.batch_size:
            self._train_loader = self._new_train_loader()
        return self._train_loader  # the same one if asked again, or its place would be lost

    @override
    def val_dataloader(self) -> EvalLoader:
        """The validation split, at most ``max_val_tokens`` of it."""
        return self._eval_loader("validation")

    @override
    def test_dataloader(self) -> EvalLoader:
        """The test split, at most ``max_val_tokens`` of it."""
        return self._eval_loader("test")

    @override
    def predict_dataloader(self) -> PromptLoader:
        return PromptLoader(self._prompts, self._known_tokenizer())

    def decode(self, ids: Iterable[int] | torch.Tensor) -> str:
        """The text of 1-D token ids."""
        return self._known_tokenizer().decode(ids.tolist() if isinstance(ids, torch.Tensor) else ids)

    @override
    def state_dict(self) -> dict[str, str]:
        """The tokenizer; the place in the data is the train loader's to keep."""
        return {} if self._tokenizer is None else {"tokenizer": self._tokenizer.to_json()}

    @override
    def load_state_dict(self, state_dict: dict[str, str]) -> None:
        """Take the checkpoint's tokenizer; Lightning calls this after ``setup`` and before any loop."""
        if "tokenizer" not in state_dict:
            return
        self._tokenizer = load_tokenizer(state_dict["tokenizer"])
        if self._text is not None and self._text.tokenizer.to_json() != self._tokenizer.to_json():
            self._text = self._train_loader = None  # made with other tokens, to be made again with these

    def _prepared(self) -> PreparedText:
        if self._text is None:
            self._text = prepare_text(self._path, self._kind, self._vocab_size, self._cache_dir, self._tokenizer)
            self._tokenizer = self._text.tokenizer
        return self._text

    def _new_train_loader(self) -> TrainLoader | EvalLoader:
        windows, (rank, world_size) = self._windows("train"), self._ranks()
        self._loader_batch_size = self.batch_size
        if self.trainer is not None and self.trainer.overfit_batches > 0:  # type: ignore[attr-defined]
            return EvalLoader(windows, self.batch_size, full_batches=True, rank=rank, world_size=world_size)
        return TrainLoader(
            windows,
            self.batch_size,
            seed=self._seed,
            rank=rank,
            world_size=world_size,
            fingerprint=self._prepared().fingerprint,
            unfinished=self._unfinished,
            previous=self._train_loader if isinstance(self._train_loader, TrainLoader) else None,
        )

    def _eval_loader(self, split: str) -> EvalLoader:
        windows, (rank, world_size) = self._windows(split), self._ranks()
        return EvalLoader(windows, self.batch_size, max_tokens=self._max_val_tokens, rank=rank, world_size=world_size)

    def _windows(self, split: str) -> Windows:
        self._check_ranks_agree()
        on_gpu = self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"
        tokens = self._prepared().tokens[split]
        return Windows(tokens, self._seq_len, split, num_workers=self._num_workers, pin_memory=on_gpu)

    def _ranks(self) -> tuple[int, int]:
        return (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)

    def _check_ranks_agree(self) -> None:
        # Ranks with different text would take different numbers of steps, and wait for each other without end.
        if self.trainer is None or self.trainer.world_size == 1:
            return
        strategy = self.trainer.strategy
        mine = torch.tensor(int(self._prepared().fingerprint[:15], 16), device=strategy.root_device)
        if len(strategy.all_gather(mine).unique()) > 1:
            raise ValueError("data: every rank must read the same text, got different text; check path")

    def _unfinished(self) -> int:
        """Batches that Lightning has fetched and not trained on: 1 inside a training step, else 0."""
        if self.trainer is None:
            return 0
        progress = self.trainer.fit_loop.epoch_loop.batch_progress.current
        return progress.ready - progress.processed  # type: ignore[attr-defined]

    def _predicting(self) -> bool:
        return self.trainer is not None and self.trainer.state.fn == TrainerFn.PREDICTING

    def _known_tokenizer(self) -> Tokenizer:
        if self._tokenizer is None:
            raise ValueError("data: tokenizer='bpe' must come from a checkpoint to predict, got none; give ckpt_path")
        return self._tokenizer
