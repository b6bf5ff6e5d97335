from moe_lightning.data.corpus import SPLITS, scan, split


def test_split_by_file_uses_each_file_once_and_whole(folder):
    documents = scan(str(folder))
    splits = split(documents)
    assert list(splits) == ["train", "validation", "test"]
    pieces = [piece for pieces in splits.values() for piece in pieces]
    assert sorted(piece.document.path for piece in pieces) == [document.path for document in documents]
    assert {(piece.first, piece.last) for piece in pieces} == {(0, 100)}
    assert len(splits["train"]) > 90


def test_split_by_file_goes_by_content(folder):
    before = {piece.document.digest: name for name, pieces in split(scan(str(folder))).items() for piece in pieces}
    (folder / "000.txt").rename(folder / "zz.txt")
    (folder / "copy.txt").write_bytes((folder / "001.txt").read_bytes())
    after = split(scan(str(folder)))
    for name, pieces in after.items():
        assert all(before[piece.document.digest] == name for piece in pieces)


def test_single_file_is_cut_in_order_and_nothing_is_lost(text_file):
    splits = split(scan(str(text_file)))
    texts = ["".join(piece.parts()) for name in SPLITS for piece in splits[name]]
    assert "".join(texts) == text_file.read_text()
    assert [len(text) for text in texts] == [7200, 400, 400]


def test_cut_is_between_characters(tmp_path):
    (tmp_path / "a.txt").write_text("äöü" * 33, "utf-8")
    texts = ["".join(piece.parts()) for pieces in split(scan(str(tmp_path))).values() for piece in pieces]
    assert "".join(texts) == "äöü" * 33


def test_few_files_are_all_cut(tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.txt").write_text(str(i) * 100)
    splits = split(scan(str(tmp_path)))
    assert ["".join(piece.parts()) for piece in splits["validation"]] == ["00000", "11111", "22222"]
    assert [piece.size for piece in splits["train"]] == [90, 90, 90]
