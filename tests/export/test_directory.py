"""The folder of a pair, and what happens when it cannot be written."""

import errno
import os
import resource
import subprocess
import sys

import onnx
import pytest
from tiny_export import FILES, contents, error_line, export

from moe_lightning.export.__main__ import main
from moe_lightning.export.agreement import open_session
from moe_lightning.models import MLP
from moe_lightning.utils.files import HOST

MLP_FLAGS = ["--device", "cpu", "--dtype", "fp32", "--batch", "2", "--hidden", "128", "--export_onnx_dir"]


def test_the_usual_command(tmp_path, capsys):
    main([*MLP_FLAGS, str(tmp_path / "a" / "b")])
    printed = capsys.readouterr().out
    assert contents(tmp_path / "a" / "b") == FILES
    assert "onnxruntime on random 3 x 128: largest difference" in printed


@pytest.mark.parametrize("given", ["../beside", "here/../below", "/absolute"])
def test_any_folder_may_be_named_and_the_graph_names_its_weights_by_their_bare_name(given, tmp_path, monkeypatch):
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    folder = tmp_path / given.removeprefix("/") if given.startswith("/") else given
    export(MLP(128), folder)
    place = {"../beside": "beside", "here/../below": "work/below", "/absolute": "absolute"}[given]
    assert contents(tmp_path / place) == FILES
    graph = onnx.load(tmp_path / place / "__model__", load_external_data=False).graph
    external = [entry.value for t in graph.initializer for entry in t.external_data if entry.key == "location"]
    assert external
    assert set(external) == {"__params__"}


def test_an_older_pair_is_replaced_and_other_files_stay(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    export(MLP(64), tmp_path)
    before = (tmp_path / "__params__").read_bytes()
    export(MLP(64), tmp_path)
    assert contents(tmp_path) == [*FILES, "notes.txt"]
    assert len((tmp_path / "__params__").read_bytes()) == len(before)
    assert (tmp_path / "__params__").read_bytes() != before


def test_a_model_too_small_for_external_weights_is_a_pair_too(tmp_path):
    export(MLP(2), tmp_path)
    assert contents(tmp_path) == FILES


def test_a_file_or_a_link_in_the_way(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert "must be a folder, got the file" in error_line(capsys, *MLP_FLAGS, str(tmp_path / "file"))
    assert "must be a folder, got the file" in error_line(capsys, *MLP_FLAGS, str(tmp_path / "file" / "below"))
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    for behind in ("link", "link/below"):
        line = error_line(capsys, *MLP_FLAGS, str(tmp_path / behind))
        assert "must not be reached through a symbolic link" in line
        assert str(tmp_path / "real") in line
    assert "must not be reached through a symbolic link" in error_line(
        capsys, *MLP_FLAGS, str(tmp_path / "link" / ".." / "x")
    )
    assert contents(tmp_path) == ["file", "link", "real"]
    (tmp_path / "real" / "__params__").symlink_to(tmp_path / "file")
    assert "__params__ must be a plain file" in error_line(capsys, *MLP_FLAGS, str(tmp_path / "real"))


def test_a_folder_without_permission(tmp_path, capsys, monkeypatch):
    # The superuser may write anywhere, so permission is taken away where it is asked for.
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert "must be writable" in error_line(capsys, *MLP_FLAGS, str(tmp_path / "new"))
    assert contents(tmp_path) == []


def test_dots_lead_where_they_say(tmp_path):
    export(MLP(64), tmp_path / "not" / "there" / ".." / "x")
    assert contents(tmp_path) == ["not"]
    assert contents(tmp_path / "not") == ["x"]


def test_the_folder_has_the_permissions_of_any_other(tmp_path):
    export(MLP(64), tmp_path / "pair")
    (tmp_path / "other").mkdir()
    assert (tmp_path / "pair").stat().st_mode == (tmp_path / "other").stat().st_mode


@pytest.mark.parametrize("there_before", [False, True])
def test_what_killed_exports_left_goes_and_what_others_write_stays(tmp_path, there_before):
    killed = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    pair = tmp_path / "pair"
    if there_before:
        pair.mkdir()
    home = pair if there_before else tmp_path
    of_the_dead, of_the_living, of_another_host = (
        home / name
        for name in (
            f".1f.{HOST}-{killed.stdout.strip()}.tmp",
            f".1f.{HOST}-{os.getpid()}.tmp",
            f".1f.not_{HOST}-{killed.stdout.strip()}.tmp",
        )
    )
    for leftover in (of_the_dead, of_the_living, of_another_host):
        leftover.mkdir()
        (leftover / "__params__").write_bytes(b"half")
    export(MLP(64), pair)
    assert [path.exists() for path in (of_the_dead, of_the_living, of_another_host)] == [False, True, True]
    assert set(FILES) <= set(contents(pair))


@pytest.mark.parametrize("name", ["sync", "os.replace"])
def test_a_disk_that_fills_at_the_end(tmp_path, capsys, monkeypatch, name):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(f"moe_lightning.utils.files.{name}", full)
    line = error_line(capsys, *MLP_FLAGS, str(tmp_path / "a" / "b"))
    assert "must fit on the disk and be allowed there, got No space left on device" in line
    assert contents(tmp_path) == []


@pytest.mark.parametrize("there_before", [False, True])
def test_a_disk_that_fills_leaves_nothing_new(tmp_path, capsys, there_before):
    target = tmp_path / "pair"
    if there_before:
        export(MLP(64), target)
    before = {name: (target / name).read_bytes() for name in FILES} if there_before else None
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, limits[1]))  # the weights of --hidden 128 are twice that
    try:
        line = error_line(capsys, *MLP_FLAGS, str(target))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "must fit on the disk" in line
    assert "File too large" in line
    if there_before:
        assert {name: (target / name).read_bytes() for name in contents(target)} == before
    else:
        assert contents(tmp_path) == []


@pytest.mark.parametrize("name", FILES)
def test_damage_is_noticed(tmp_path, name):
    export(MLP(64), tmp_path)
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="export: onnxruntime must open the model files"):
        open_session(tmp_path)


def test_a_file_that_computes_something_else_is_not_left(tmp_path, capsys, monkeypatch):
    from moe_lightning.export import model_files

    spoil = model_files.exportable

    def spoilt(network, form):
        copy = spoil(network, form)
        copy.first = type(copy.first)(128, 128)
        return copy

    monkeypatch.setattr(model_files, "exportable", spoilt)
    assert "outputs must differ by at most 1e-05" in error_line(capsys, *MLP_FLAGS, str(tmp_path / "new"))
    assert contents(tmp_path) == []
