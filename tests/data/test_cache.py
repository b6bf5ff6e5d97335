import errno
import multiprocessing
import os
import subprocess
import threading
from pathlib import Path

import pytest
from data_processes import hang_in_build

from moe_lightning.data import cache
from moe_lightning.data.cache import build_once, private_folder


def test_second_builder_waits_for_the_first_and_builds_nothing(tmp_path, monkeypatch):
    path = tmp_path / "file"
    started, waiting = threading.Event(), threading.Event()
    monkeypatch.setattr(cache, "rank_zero_info", lambda message: waiting.set())

    def build(file):
        started.set()
        assert waiting.wait(60)
        file.write(b"once")

    first = threading.Thread(target=build_once, args=(path, Path.exists, build))
    first.start()
    assert started.wait(60)
    build_once(path, Path.exists, lambda file: pytest.fail("built twice"))
    first.join()
    assert path.read_bytes() == b"once"


@pytest.mark.slow
def test_killed_writer_blocks_nobody_and_leaves_no_file(tmp_path):
    path = tmp_path / "file"
    context = multiprocessing.get_context("forkserver")
    pipe, theirs = context.Pipe()
    process = context.Process(target=hang_in_build, args=(theirs, str(path)), daemon=True)
    process.start()
    theirs.close()
    assert pipe.recv() == "writing"
    [half] = tmp_path.glob(".*.tmp")
    assert half.read_bytes() == b"half"
    process.kill()
    process.join()
    assert not path.exists()
    build_once(path, Path.exists, lambda file: file.write(b"whole"))
    assert path.read_bytes() == b"whole"
    assert sorted(os.listdir(tmp_path)) == ["file", "file.lock"]


def test_failed_build_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def fail(file):
        file.write(b"new")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(ValueError, match=r"^data\.cache: \S+/file must be .*, got No space left on device; make room"):
        build_once(path, lambda path: False, fail)
    assert path.read_bytes() == b"old"
    assert sorted(os.listdir(tmp_path)) == ["file", "file.lock"]


@pytest.mark.parametrize("name", ["file", "file.lock"])
def test_folder_in_place_of_a_cache_file_is_one_line_with_its_name(tmp_path, name):
    (tmp_path / name).mkdir()
    with pytest.raises(ValueError, match=r"^data\.cache: \S+/file must be a file that can be written, got Is a dir"):
        build_once(tmp_path / "file", Path.is_file, lambda file: file.write(b"whole"))


def test_full_disk_is_one_line_with_the_files_name_and_leaves_nothing(tmp_path):
    """A real one: what is written fails, and so may what is buffered, when the file is flushed."""
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", tmp_path]).returncode:
        pytest.skip("needs to mount a file system")
    try:
        path = tmp_path / "tokens.bin"
        with pytest.raises(ValueError, match=r"^data\.cache: \S+/tokens\.bin must .*, got No space left on device; "):
            build_once(path, Path.exists, lambda file: file.write(bytes(1 << 20)))
        assert os.listdir(tmp_path) == ["tokens.bin.lock"]
        build_once(path, Path.exists, lambda file: file.write(b"small"))
        assert path.read_bytes() == b"small"
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def test_valid_file_is_not_built_again(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"here")
    build_once(path, Path.exists, lambda file: pytest.fail("built again"))


def test_cache_folder_is_made_private(tmp_path):
    old = os.umask(0)
    try:
        folder = private_folder(tmp_path / "a" / "b")
    finally:
        os.umask(old)
    assert folder.stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize("mode", [0o777, 0o1777])
def test_world_writable_cache_folder_is_refused(tmp_path, mode):
    tmp_path.chmod(mode)
    with pytest.raises(ValueError, match=r"cache_dir must not be writable by everyone, got .*; choose another"):
        private_folder(tmp_path)


def test_cache_folder_that_is_a_file_is_refused(text_file):
    with pytest.raises(ValueError, match=r"^data\.cache: cache_dir must be a folder this user can make, got"):
        private_folder(text_file)
