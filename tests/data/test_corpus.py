import sysconfig
from pathlib import Path

import pytest

from moe_lightning.training.data.corpus import scan


def names(path) -> list[str]:
    return [document.path.name for document in scan(str(path))]


def test_default_is_the_standard_library_without_what_was_installed():
    documents = scan(None)
    stdlib = Path(sysconfig.get_path("stdlib"))
    parts = {part for document in documents for part in document.path.relative_to(stdlib).parts}
    assert {"argparse.py", "json", "asyncio"} <= parts
    assert not parts & {"site-packages", "dist-packages", "test", "__pycache__"}
    assert sum(document.size for document in documents) > 5e6
    assert documents == scan(None)


def test_folder_is_read_deep_sorted_and_only_where_text_is_expected(tmp_path):
    for name in (
        "b.txt",
        "a.md",
        "sub/deep/c.py",
        "picture.png",
        ".hidden.txt",
        ".git/d.txt",
        "__pycache__/e.py",
    ):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("text")
    assert names(tmp_path) == ["a.md", "b.txt", "c.py"]


def test_file_and_glob_are_taken_at_their_word(tmp_path):
    for name in ("one.data", "two.data", "sub/three.data", "four.txt"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(name)
    assert names(tmp_path / "one.data") == ["one.data"]
    assert names(tmp_path / "*.data") == ["one.data", "two.data"]
    assert names(tmp_path / "**" / "*.data") == ["one.data", "three.data", "two.data"]


def test_bad_encodings_are_counted_and_reported_in_one_line(tmp_path):
    (tmp_path / "good.txt").write_text("naïve")
    (tmp_path / "latin1.txt").write_bytes("naïve".encode("latin-1"))
    (tmp_path / "utf16.txt").write_bytes("naïve".encode("utf-16"))
    with pytest.warns(UserWarning, match="skipped") as caught:
        assert names(tmp_path) == ["good.txt"]
    assert [str(warning.message) for warning in caught] == [
        f"data.corpus: skipped 2 files that are not UTF-8 text, the first is {tmp_path / 'latin1.txt'}"
    ]


def test_byte_order_mark_is_not_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfhello")
    assert scan(str(tmp_path))[0].read() == "hello"


@pytest.mark.filterwarnings("ignore:.*skipped 1 files")
@pytest.mark.parametrize("name", ["missing", "missing/*.txt", "empty", "empty.txt", "bad.txt"])
def test_nothing_to_read_is_one_clear_line(tmp_path, name):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty.txt").touch()
    (tmp_path / "bad.txt").write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"^data\.corpus: path must .*, got '") as error:
        scan(str(tmp_path / name))
    assert "\n" not in str(error.value)
    assert name in str(error.value)


def test_file_that_changes_after_the_scan_is_an_error(text_file):
    (document,) = scan(str(text_file))
    text_file.write_text("other")
    with pytest.raises(ValueError, match=r"text\.txt changed while it was read"):
        document.read()
