"""The documents of a corpus: UTF-8 files, each named by its content and read in parts."""

import codecs
import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from moe_lightning.data.file_records import FileRecords, file_stamp
from moe_lightning.data.file_search import Skipped, find_files, unreadable
from moe_lightning.data.formats import REMEDIES, UNREAD_SUFFIXES, unread_format
from moe_lightning.data.progress import slow_progress

BLOCK_BYTES = 1 << 20
# A text is handed out in parts of at most this many characters, cut at line ends, so that memory stays flat.
PART_CHARS = 1 << 16
NOT_UTF8 = "not UTF-8"


@dataclass(frozen=True)
class Document:
    """One UTF-8 file: where it is, the SHA-256 of its bytes, how many bytes and characters it has.

    A byte-order mark is no character. ``stamp`` is the `file_stamp` of the file that was hashed.
    """

    path: Path
    digest: str
    size: int
    characters: int
    stamp: tuple[int, int, int] = field(compare=False)

    def parts(self, first: int = 0, last: int = 100) -> Iterator[str]:
        """The text from ``first`` to ``last`` percent of its characters, in parts of at most PART_CHARS.

        ValueError if the file changed since the corpus was scanned.
        """
        text = ""
        for block in self._blocks(self.characters * first // 100, self.characters * last // 100):
            text += block
            start = 0
            while len(text) - start > PART_CHARS:
                end = text.rfind("\n", start, start + PART_CHARS) + 1 or start + PART_CHARS
                yield text[start:end]
                start = end
            text = text[start:]
        yield text

    def _blocks(self, start: int, stop: int) -> Iterator[str]:
        """Characters from ``start`` to ``stop``."""
        decoder = codecs.getincrementaldecoder("utf-8-sig")()
        position = 0
        try:
            with self.path.open("rb") as file:
                _check_unchanged(file.fileno(), self.path, self.stamp)
                while position < stop and (content := file.read(BLOCK_BYTES)):
                    block = decoder.decode(content)
                    yield block[max(0, start - position) : stop - position]
                    position += len(block)
                _check_unchanged(file.fileno(), self.path, self.stamp)
        except OSError as error:
            raise ValueError(f"data.corpus: {self.path} must stay readable, got {error.strerror}") from None


def scan(path: str | None, records: FileRecords | None = None) -> list[Document]:
    """Every non-empty text file that `find_files` finds at ``path``, in the order of its path.

    Text is UTF-8 without NUL bytes. Other files, and data in formats that are not read, are skipped and counted in
    one warning. What ``records`` knows of a file is not read again. ValueError where no text is left, and where the
    formats that are not read hold more bytes than the text.
    """
    files, skipped = find_files(path)
    documents: list[Document] = []
    unread_bytes = 0
    with slow_progress("Reading", sum(status.st_size for _, status in files)) as advance:
        for file, status in files:
            finding = None if records is None else records.look_up(file, status)
            if finding is not None:
                advance(status.st_size)
            else:
                try:
                    finding = _examine(file, status, advance)
                except OSError as error:
                    skipped.append((file, unreadable(error)))
                    continue
                if records is not None:
                    records.note(file, status, finding)
            if len(finding) == 1:
                skipped.append((file, finding[0]))
                unread_bytes += status.st_size if finding[0] in REMEDIES else 0
            elif status.st_size:
                digest, characters = finding
                documents.append(Document(file, digest, status.st_size, characters, file_stamp(status)))
    if not documents or unread_bytes > sum(document.size for document in documents):
        raise ValueError(f"data.corpus: path must hold plain UTF-8 text, got {path!r} with {_refusal(skipped)}")
    if skipped:
        rank_zero_warn(f"data.corpus: skipped {_counted(skipped)}")
    return documents


def _examine(path: Path, status: os.stat_result, advance: Callable[[int], None]) -> list[Any]:
    """[SHA-256, characters] of a text file, [why] of another; OSError where it cannot be read."""
    if name := UNREAD_SUFFIXES.get(path.suffix.lower()):
        advance(status.st_size)
        return [name]
    digest, decoder, characters = hashlib.sha256(), codecs.getincrementaldecoder("utf-8-sig")(), 0
    with path.open("rb") as file:
        head = content = file.read(BLOCK_BYTES)
        if name := unread_format(head, path.suffix.lower()):
            return [name]
        while content:
            try:
                characters += len(decoder.decode(content))
            except UnicodeDecodeError:
                return [NOT_UTF8]
            if b"\0" in content:
                return ["binary"]
            digest.update(content)
            advance(len(content))
            content = file.read(BLOCK_BYTES)
        _check_unchanged(file.fileno(), path, file_stamp(status))
    if decoder.getstate()[0]:  # the file ends inside a character
        return [NOT_UTF8]
    return [digest.hexdigest(), characters]


def _check_unchanged(descriptor: int, path: Path, stamp: tuple[int, int, int]) -> None:
    if file_stamp(os.fstat(descriptor)) != stamp:
        raise ValueError(f"data.corpus: {path} changed while it was read, start again when it is at rest")


def _counted(skipped: Skipped) -> str:
    reasons = Counter(why for _, why in skipped)
    counts = ", ".join(f"{count} {why}" for why, count in reasons.items())
    return f"{counts}; the first is {skipped[0][0]}"


def _refusal(skipped: Skipped) -> str:
    if not skipped:
        return "no such file; from a folder only text suffixes are read, name others with a glob such as 'folder/*.ext'"
    remedies = dict.fromkeys(REMEDIES[why] for _, why in skipped if why in REMEDIES)
    remedy = " and ".join(remedies) or "give files of UTF-8 text that this user may read"
    return f"{_counted(skipped)}; {remedy}, or name the text with a glob such as 'folder/**/*.txt'"
