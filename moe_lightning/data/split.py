"""Split a corpus into train, validation and test."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from moe_lightning.data.corpus import Document

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
