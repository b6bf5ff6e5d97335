import sysconfig
from pathlib import Path

import numpy as np
import pytest

from moe_lightning.data import corpus
from moe_lightning.data.corpus import scan


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
    assert names(tmp_path / "**") == ["four.txt", "one.data", "three.data", "two.data"]
    assert names(tmp_path / "**" / "**" / "sub" / "**" / "*") == ["three.data"]


def test_glob_follows_a_link_once_and_a_loop_of_links_never(tmp_path):
    """Two loops that meet would be 2^40 paths."""
    (tmp_path / "texts" / "deep").mkdir(parents=True)
    (tmp_path / "other").mkdir()
    for name in ("texts/a.txt", "texts/deep/b.txt", "other/c.txt"):
        (tmp_path / name).write_text(name)
    for link, target in {"up": "..", "again": "../texts", "aside": "../other", "deep/top": "../.."}.items():
        (tmp_path / "texts" / link).symlink_to(target)
    (tmp_path / "texts" / "link.txt").symlink_to("a.txt")
    (tmp_path / "texts" / "same.txt").hardlink_to(tmp_path / "texts" / "a.txt")
    assert names(tmp_path / "texts" / "**" / "*.txt") == ["a.txt", "c.txt", "b.txt"]
    assert names(tmp_path / "texts" / "*.txt") == ["a.txt"]


def test_relative_glob_names_what_is_below_the_working_folder(tmp_path, monkeypatch):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.txt").write_text("a")
    monkeypatch.chdir(tmp_path)
    assert [document.path for document in scan("**/*.txt")] == [Path("sub/a.txt")]
    assert [document.path for document in scan("**")] == [Path("sub/a.txt")]


def test_what_is_no_text_is_counted_and_reported_in_one_line(tmp_path):
    (tmp_path / "good.txt").write_text("naïve, and longer than what is not read" * 9)
    (tmp_path / "latin1.txt").write_bytes("naïve".encode("latin-1"))
    (tmp_path / "utf16.txt").write_bytes("naïve".encode("utf-16"))
    (tmp_path / "cut.txt").write_bytes("naï".encode()[:-1])
    (tmp_path / "zeros.txt").write_bytes(b"a\0b")
    (tmp_path / "more.jsonl").write_text('{"text": "a"}')
    (tmp_path / "gone.txt").symlink_to("nowhere")
    (tmp_path / "self.txt").symlink_to("self.txt")
    (tmp_path / "error.txt").symlink_to("/proc/self/mem")  # reading its first byte is an I/O error, for root too
    (tmp_path / "linked").symlink_to("/")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    with pytest.warns(UserWarning, match="skipped") as caught:
        assert names(tmp_path) == ["good.txt"]
    (warning,) = (str(warning.message) for warning in caught)
    counts, first = warning.removeprefix("data.corpus: skipped ").split("; the first is ")
    assert sorted(counts.split(", ")) == [
        "1 JSON Lines",
        "1 binary",
        "1 linked folders",
        "1 unreadable (Input/output error)",
        "1 unreadable (No such file or directory)",
        "1 unreadable (Too many levels of symbolic links)",
        "3 not UTF-8",
    ]
    assert first == str(tmp_path / "linked")


UNREAD = {
    "docs.jsonl": (b'{"text": "a"}\n', "JSON Lines", "write the text of the records"),
    "docs.NDJSON": (b'{"text": "a"}\n', "JSON Lines", "write the text of the records"),
    "lines.json": (b'{"text": "a"}\n{"text": "b"}\n', "JSON records", "write the text of the records"),
    "array.json": (b'[\n {"text": "a"},\n {"text": "b"}]', "JSON records", "write the text of the records"),
    "docs.parquet": (b"PAR1", "Parquet", "write the text of the records"),
    "docs.arrow": (b"ARROW1", "Arrow", "write the text of the records"),
    "docs.txt.gz": (b"\x1f\x8b", "gzip", "unpack it"),
    "docs.zst": (b"\x28\xb5\x2f\xfd", "Zstandard", "unpack it"),
    "train.bin": (b"valid UTF-8", "binary tokens", "give the text it was made from"),
    "train.idx": (b"MMIDIDX\0\0", "token index", "give the text it was made from"),
    "train.npy": (b"\x93NUMPY", "NumPy", "give the text it was made from"),
    # by their content, whatever they are called
    "parquet.data": (b"PAR1", "Parquet", "write the text of the records"),
    "zst.data": (b"\x28\xb5\x2f\xfd", "Zstandard", "unpack it"),
    "npy.data": (b"\x93NUMPY", "NumPy", "give the text it was made from"),
    "tar.data": (b"name".ljust(257) + b"ustar", "tar", "unpack it"),
    "tokens.data": (np.arange(1, 100, dtype="<u2").tobytes(), "binary", "give files of UTF-8 text"),
}


@pytest.mark.parametrize("name", UNREAD)
@pytest.mark.parametrize("pattern", ["{}", "*"], ids=["file", "glob"])
def test_known_format_that_is_not_read_is_refused_by_name(tmp_path, name, pattern):
    content, kind, remedy = UNREAD[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=r"^data\.corpus: path must hold plain UTF-8 text, got '") as error:
        scan(str(tmp_path / pattern.format(name)))
    assert f" with 1 {kind}; the first is {tmp_path / name}; {remedy}" in str(error.value)
    assert "\n" not in str(error.value)


def test_folder_of_records_with_little_text_beside_them_is_refused(tmp_path):
    (tmp_path / "README.md").write_text("hello")
    (tmp_path / "train.jsonl").write_text('{"text": "hello"}')
    with pytest.raises(ValueError, match=r"got '\S+' with 1 JSON Lines; the first is \S+/train\.jsonl; write the text"):
        scan(str(tmp_path))


@pytest.mark.parametrize("content", ['{"name": "a"}', '{\n "name": "a"\n}\n', "[1,\n2]", "", "{", "3\n4\n"])
def test_json_that_is_one_value_is_text(tmp_path, content):
    (tmp_path / "package.json").write_text(content)
    (tmp_path / "a.txt").write_text("a")
    assert names(tmp_path) == ["a.txt", "package.json"][: 2 if content else 1]


def test_byte_order_mark_is_not_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfhello")
    assert list(scan(str(tmp_path))[0].parts()) == ["hello"]


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
        list(document.parts())


def test_text_is_handed_out_in_parts_that_make_it_up(tmp_path, monkeypatch):
    """Whatever stands at the borders of the blocks that are read: lines, no lines, characters of 1 to 4 bytes."""
    monkeypatch.setattr(corpus, "PART_CHARS", 16)
    monkeypatch.setattr(corpus, "BLOCK_BYTES", 7)
    for text in ("line\n" * 50, "x" * 200, "a\n" + "y" * 100 + "\nz", "\n" * 33, "aäœ€😀\n" * 40, "\ufeffb" * 9):
        (tmp_path / "a.txt").write_text("\ufeff" + text)
        (document,) = scan(str(tmp_path))
        assert document.characters == len(text)
        parts = list(document.parts())
        assert "".join(parts) == text
        assert max(map(len, parts)) <= 16
        for first, last in ((0, 90), (90, 95), (95, 100), (50, 50)):
            assert "".join(document.parts(first, last)) == text[len(text) * first // 100 : len(text) * last // 100]
    assert [len(part) for part in parts] == [16, 2]


def test_lines_are_kept_whole_where_they_fit_in_a_part(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "PART_CHARS", 16)
    (tmp_path / "a.txt").write_text("seven..\n" * 5 + "0123456789abcdefghij")
    (document,) = scan(str(tmp_path))
    assert list(document.parts()) == ["seven..\nseven..\n"] * 2 + ["seven..\n", "0123456789abcdef", "ghij"]
