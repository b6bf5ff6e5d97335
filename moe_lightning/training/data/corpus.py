"""Find the text files of a corpus and name each by its content."""

import glob
import hashlib
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lightning.pytorch.utilities.rank_zero import rank_zero_warn

# A folder may hold anything; only these endings are read from it. A file or a glob is taken at its word.
_ENDINGS = "txt md rst tex html xml csv json jsonl yaml toml py c h cc cpp hpp cu cuh rs go java js ts sh sql"
TEXT_SUFFIXES = frozenset(f".{ending}" for ending in _ENDINGS.split())
# Installed packages and test data differ from machine to machine; the library itself does not.
STDLIB_SKIPPED = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test"})


@dataclass(frozen=True)
class Document:
    """One UTF-8 file: where it is, the SHA-256 of its bytes, and how many bytes it has."""

    path: Path
    digest: str
    size: int

    def read(self) -> str:
        """The text of the file; ValueError if it changed since the corpus was scanned."""
        content = self.path.read_bytes()
        if hashlib.sha256(content).hexdigest() != self.digest:
            raise ValueError(f"data.corpus: {self.path} changed while it was read, start again when it is at rest")
        return content.decode("utf-8-sig")


def scan(path: str | None) -> list[Document]:
    """Every non-empty UTF-8 file of the corpus, in the order of its path.

    ``path`` is a file, a folder (recursive, the files with one of TEXT_SUFFIXES, no hidden ones), a glob
    (``**`` is recursive) or None: the source of the running Python's standard library. Files that are not
    UTF-8 are skipped and reported together in one line. ValueError where nothing is left.
    """
    documents, skipped = [], []
    for file in sorted(_files(path), key=lambda file: file.as_posix()):
        try:
            content = file.read_bytes()
            content.decode("utf-8-sig")
        except (OSError, UnicodeDecodeError):
            skipped.append(file)
            continue
        if content:
            documents.append(Document(file, hashlib.sha256(content).hexdigest(), len(content)))
    if skipped:
        rank_zero_warn(f"data.corpus: skipped {len(skipped)} files that are not UTF-8 text, the first is {skipped[0]}")
    if not documents:
        raise ValueError(
            f"data.corpus: path must hold UTF-8 text, got {path!r} with no such file; "
            "from a folder only text suffixes are read, name others with a glob such as 'folder/*.ext'"
        )
    return documents


def _files(path: str | None) -> Iterator[Path]:
    if path is None:
        stdlib = Path(sysconfig.get_path("stdlib"))
        return (file for file in _walk(stdlib, STDLIB_SKIPPED) if file.suffix == ".py")
    root = Path(path).expanduser()
    if root.is_dir():
        return (file for file in _walk(root) if file.suffix.lower() in TEXT_SUFFIXES)
    if root.is_file():
        return iter([root])
    if not glob.has_magic(path):
        raise ValueError(f"data.corpus: path must be a file, a folder or a glob, got {path!r}; there is none")
    return (file for name in glob.iglob(str(root), recursive=True) if (file := Path(name)).is_file())


def _walk(root: Path, skipped: frozenset[str] = frozenset()) -> Iterator[Path]:
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in skipped and _is_source(name)]
        yield from (file for name in names if _is_source(name) and (file := Path(folder, name)).is_file())


def _is_source(name: str) -> bool:
    return not name.startswith(".") and name != "__pycache__"
