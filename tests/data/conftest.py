from pathlib import Path

import pytest
from random_text import words


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    """One file of 8,000 characters: 7,200 to train on, 400 to validate, 400 to test."""
    path = tmp_path / "text.txt"
    path.write_text(words(1000))
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """120 files of 200 characters: enough for a split by file."""
    root = tmp_path / "texts"
    root.mkdir()
    for i in range(120):
        (root / f"{i:03}.txt").write_text(words(25, f"{i}-"))
    return root
