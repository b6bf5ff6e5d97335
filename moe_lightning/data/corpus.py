"""The documents of a corpus: UTF-8 files, each named by its content, read in parts, and split for training.

What is known of a file is kept until the file changes, so that a later start does not read it again.
"""

import codecs
import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from moe_lightning.data.cache import build_once, slow_progress
from moe_lightning.data.file_search import REMEDIES, UNREAD_SUFFIXES, Skipped, find_files, unread_format, unreadable

# A file changed twice within one tick of the file system's clock may have one time for two contents (git calls it
# racily clean): what is younger than this is looked at again next time.
SETTLED_NS = 2_000_000_000
# Raise it when the finding about a file changes, such as which formats are read.
FORMAT = "moe_lightning files 1"


class FileRecords:
    """Findings by path, each true while the file has the size and times that it had.

    Kept as JSON in ``file``, written whole or not at all; a damaged one counts as empty. A finding is a list that
    JSON can hold.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._changed = False
        try:
            saved = json.loads(file.read_bytes())
        except (OSError, ValueError):
            saved = None
        whole = isinstance(saved, dict) and saved.get("format") == FORMAT
        self._findings: dict[str, list[Any]] = saved["files"] if whole else {}

    def look_up(self, path: Path, status: os.stat_result) -> list[Any] | None:
        """What ``note`` was given for this state of the file, else None."""
        entry = self._findings.get(os.path.abspath(path), [])
        return entry[1:] if entry[:1] == [list(file_stamp(status))] else None

    def note(self, path: Path, status: os.stat_result, finding: Sequence[Any]) -> None:
        """Remember ``finding`` for the state of the file that ``status`` describes, unless it is too young."""
        if time.time_ns() - max(status.st_mtime_ns, status.st_ctime_ns) < SETTLED_NS:
            return
        self._findings[os.path.abspath(path)] = [list(file_stamp(status)), *finding]
        self._changed = True

    def save(self) -> None:
        """Write what is new; files that are gone are forgotten. A warning, and no error, where there is no space."""
        if not self._changed:
            return
        self._findings = {path: entry for path, entry in self._findings.items() if os.path.exists(path)}
        content = json.dumps({"format": FORMAT, "files": self._findings}).encode()
        try:
            build_once(self._file, lambda _: False, lambda file: file.write(content))
        except ValueError as error:
            rank_zero_warn(f"{error}; the next start reads the text again")
        self._changed = False


def file_stamp(status: os.stat_result) -> tuple[int, int, int]:
    """Size and times; the second time is the kernel's own and changes with every write and rename."""
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns


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


# name -> the percent of the corpus it takes, [first, last)
SPLITS = {"train": (0, 90), "validation": (90, 95), "test": (95, 100)}
# Part of every cache key: raise it when the rule below, or the way text is tokenised, changes.
RULE_VERSION = "1"


@dataclass(frozen=True)
class Piece:
    """The characters of a document from ``first`` to ``last`` percent of its length."""

    document: Document
    first: int = 0
    last: int = 100

    @property
    def size(self) -> int:
        """About how many bytes of text the piece has."""
        return self.document.size * (self.last - self.first) // 100

    @property
    def characters(self) -> int:
        """How many characters of text the piece has, to one."""
        return self.document.characters * (self.last - self.first) // 100

    def parts(self) -> Iterator[str]:
        """The text of the piece, as `Document.parts`."""
        return self.document.parts(self.first, self.last)


def split(documents: Sequence[Document]) -> dict[str, list[Piece]]:
    """Split by file where there are enough files, else inside each file.

    By file: the SHA-256 of its content, modulo 100, is < 90 for train, < 95 for validation, else test. Two
    copies of a file always land together, and adding a file moves no other.
    Inside each file, where that would leave train under half of the bytes or another split under 1 % of them
    (one file, a few files): the first 90 % of its characters train, the next 5 % validation, the rest test.
    """
    by_file: dict[str, list[Piece]] = {name: [] for name in SPLITS}
    for document in documents:
        percent = int(document.digest[:16], 16) % 100
        name = next(name for name, (first, last) in SPLITS.items() if first <= percent < last)
        by_file[name].append(Piece(document))

    total = sum(document.size for document in documents)
    sizes = {name: sum(piece.size for piece in pieces) for name, pieces in by_file.items()}
    least = {"train": 0.5, "validation": 0.01, "test": 0.01}
    if all(sizes[name] >= share * total for name, share in least.items()):
        return by_file
    return {name: [Piece(document, *span) for document in documents] for name, span in SPLITS.items()}
