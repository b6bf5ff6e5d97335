"""Checkpoints: whole or not at all, verified, tensors and plain types only (catalogue rows 46, 48, 49, 58)."""

import json
import os
import pickle
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from scripts import run_forked
from tiny_run import SIZES, TRAINER, error_line, run_cli, text

from moe_lightning.training.language_module import check_same_architecture
from moe_lightning.training.resume import VerifiedCheckpointIO
from moe_lightning.utils.checkpoint_file import _append_digest, load_checkpoint, save_checkpoint
from moe_lightning.utils.files import HOST

CONTENT = {"step": 3, "name": "tiny", "weight": torch.arange(200.0), "nested": {"list": [1, 2.5, None]}}


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "a.ckpt"
    save_checkpoint(CONTENT, path)
    return path


def assert_refused(path, reason="is damaged"):
    with pytest.raises(ValueError, match=reason) as error:
        load_checkpoint(path)
    assert str(error.value).startswith("checkpoint: ")
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("load", [load_checkpoint, lambda path: torch.load(path, weights_only=True)])
def test_round_trip(saved, load):
    loaded = load(saved)
    assert torch.equal(loaded.pop("weight"), CONTENT["weight"])
    assert loaded == {name: value for name, value in CONTENT.items() if name != "weight"}


def test_empty_file(saved):
    saved.write_bytes(b"")
    assert_refused(saved)


def test_cut_anywhere(saved):
    whole = saved.read_bytes()
    for size in {*range(1, len(whole), 97), *range(len(whole) - 70, len(whole))}:
        saved.write_bytes(whole[:size])
        assert_refused(saved)


def test_one_flipped_bit_anywhere(saved):
    whole = saved.read_bytes()
    positions = {*range(0, len(whole), 7), *range(len(whole) - 80, len(whole))}
    for position in positions:
        damaged = bytearray(whole)
        damaged[position] ^= 1 << (position % 8)
        saved.write_bytes(damaged)
        assert_refused(saved)
    saved.write_bytes(whole)
    load_checkpoint(saved)


def test_torch_alone_would_load_a_flipped_bit(saved):
    whole = bytearray(saved.read_bytes())
    position = whole.index(CONTENT["weight"].numpy().tobytes()[:64]) + 30
    whole[position] ^= 1
    saved.write_bytes(whole)
    assert not torch.equal(torch.load(saved, weights_only=True)["weight"], CONTENT["weight"])
    assert_refused(saved)


@pytest.mark.parametrize("change", [lambda b: b + b"\0", lambda b: b[:100] + b[101:], lambda b: b[1024:] + b[:1024]])
def test_bytes_added_lost_or_moved(saved, change):
    saved.write_bytes(change(saved.read_bytes()))
    assert_refused(saved)


def test_file_of_another_program(tmp_path):
    path = tmp_path / "other.ckpt"
    torch.save(CONTENT, path)
    assert_refused(path, "it must be written by moe_lightning, got")


@pytest.mark.parametrize(
    "path", ["http://127.0.0.1:9/a.ckpt", "https://host/a.ckpt", "s3://bucket/a.ckpt", "file:///a"]
)
def test_url_is_refused_before_any_connection(path, monkeypatch):
    monkeypatch.setattr("socket.socket.connect", lambda *args: pytest.fail("connected"))
    assert_refused(path, "must be a local file")


def test_missing_file_and_folder(tmp_path):
    assert_refused(tmp_path / "no.ckpt", "must exist")
    assert_refused(tmp_path, "must exist")


class Malice:
    """Unpickled, it makes a folder."""

    def __init__(self, target):
        self.target = str(target)

    def __reduce__(self):
        return os.mkdir, (self.target,)


@pytest.mark.parametrize("kind", ["zip with a digest", "zip", "pickle", "pickle with a digest"])
def test_malicious_pickle_is_refused_and_not_executed(tmp_path, capsys, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    path, target = tmp_path / "evil.ckpt", tmp_path / "executed"
    if kind == "zip with a digest":
        torch.save({"state_dict": {}, "x": Malice(target)}, path)
        with path.open("r+b") as file:
            _append_digest(file)
    elif kind == "zip":
        torch.save({"x": Malice(target)}, path)
    else:
        path.write_bytes(pickle.dumps({"x": Malice(target)}) + b"\0\0")
        if kind == "pickle with a digest":
            with path.open("r+b") as file:
                _append_digest(file)
    assert_refused(
        path, {"zip": "it must be written by moe_lightning", "pickle": "is damaged"}.get(kind, "do not trust")
    )
    line = error_line(capsys, "test", "--model=mlp", f"--ckpt_path={path}", tiny=TRAINER)
    assert str(path) in line
    assert not target.exists()
    with pytest.raises(ValueError, match="checkpoint"):
        VerifiedCheckpointIO().load_checkpoint(path, weights_only=False)  # cannot be switched off
    assert not target.exists()


@pytest.mark.parametrize("how", ["deflated", "the same bytes many times over"])
def test_entries_that_grow_on_reading_are_refused_before_they_are_read(tmp_path, monkeypatch, how):
    """A zip bomb: torch stores entries as they are."""
    plain, path = tmp_path / "plain", tmp_path / "bomb.ckpt"
    torch.save({"weight": torch.zeros(300_000)}, plain)
    with zipfile.ZipFile(plain) as source, zipfile.ZipFile(path, "w") as target:
        for entry in source.infolist():
            kind = zipfile.ZIP_DEFLATED if how == "deflated" and "data/" in entry.filename else zipfile.ZIP_STORED
            target.writestr(entry.filename, source.read(entry), kind)
        if how != "deflated":
            big = max(target.filelist, key=lambda entry: entry.file_size)
            target.filelist.extend([big] * 9)
    with path.open("r+b") as file:
        _append_digest(file)
    monkeypatch.setattr(torch, "load", lambda *args, **options: pytest.fail("read"))
    assert_refused(path, "its entries must be stored as they are, got .* grow to [0-9,]{9,} bytes")


def test_failed_save_keeps_the_old_file(saved, monkeypatch):
    before = saved.read_bytes()

    def full(*args):
        raise OSError(28, "No space left on device")

    for module, name in ((torch, "save"), (os, "fsync"), (os, "replace")):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, full)
            with pytest.raises(OSError, match="No space"):
                save_checkpoint({"step": 4}, saved)
        assert saved.read_bytes() == before
        assert list(saved.parent.iterdir()) == [saved]


def test_new_file_has_the_permissions_of_any_other(saved):
    other = saved.with_name("other")
    other.touch()
    assert saved.stat().st_mode == other.stat().st_mode


def test_killed_while_saving(tmp_path):
    """Twenty SIGKILLs at random moments of a loop that saves: what is at the path always loads, and goes forward."""
    done = run_forked(tmp_path, str(Path(__file__).with_name("save_until_killed.py")), str(tmp_path / "killed.ckpt"))
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert len(report["steps"]) == 20
    assert report["steps"] == sorted(report["steps"])
    assert report["steps"][-1] > report["steps"][0]
    assert report["leftovers"] >= 1  # some kills did hit a save
    assert report["files_after_one_more_save"] == ["killed.ckpt"]


def test_leftover_of_a_checkpoint_with_another_step_in_its_name(tmp_path):
    """A run's checkpoints bear the step in their names, so the one that was cut short is never saved again."""
    killed = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    leftover = tmp_path / f".abc123.{HOST}-{killed.stdout.strip()}.tmp"
    alive = tmp_path / f".abc123.{HOST}-{os.getpid()}.tmp"
    for file in (leftover, alive):
        file.write_bytes(b"half")
    path = tmp_path / "step=20 [a].ckpt"
    save_checkpoint(CONTENT, path)
    assert sorted(tmp_path.iterdir()) == sorted([path, alive])


def test_architecture_differences_are_named_together():
    saved = {"model": "decoder_moe", "d_model": 16, "num_experts": 4, "gone": 1}
    check_same_architecture(dict(saved), saved)
    with pytest.raises(ValueError, match=r"^checkpoint: ") as error:
        check_same_architecture(saved, {"model": "decoder_moe", "d_model": 32, "num_experts": 8, "new": 2})
    text = str(error.value)
    for part in (
        "d_model saved=16 current=32",
        "num_experts saved=4 current=8",
        "gone saved=1",
        "new saved=none current=2",
    ):
        assert part in text
    assert "model saved" not in text.replace("d_model saved", "")
    with pytest.raises(ValueError, match="not written by moe_lightning"):
        check_same_architecture(None, saved)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Folder of a run, to be copied."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "text.txt").write_text(text(4000))
    save = ["--checkpoint.every_n_train_steps=2", "--checkpoint.monitor=null", "--checkpoint.dirpath=saved"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run_cli("fit", "--trainer.max_steps=2", *save, "--trainer.logger=false")
    return folder


@pytest.fixture
def trained(folder, run):
    shutil.copytree(run, folder, dirs_exist_ok=True)
    return folder / "saved/last.ckpt"


OTHER = {"num_experts": 8, "top_k": 3, "d_model": 32, "n_heads": 4, "n_layers": 1, "mlp_hidden_dim": 24}


@pytest.mark.parametrize("command", ["fit", "test", "predict"])
def test_other_sizes_are_named_saved_and_current(trained, capsys, command):
    assert OTHER.keys() == SIZES.keys()
    flags = [f"--model.{name}={value}" for name, value in OTHER.items()]
    line = error_line(capsys, command, f"--ckpt_path={trained}", *flags, tiny=TRAINER)
    for name, value in OTHER.items():
        assert f"{name} saved={SIZES[name]} current={value}" in line


def test_other_model_is_named(trained, capsys):
    line = error_line(capsys, "test", f"--ckpt_path={trained}", "--model=mlp", "--model.d_model=16", tiny=TRAINER)
    assert "model saved=decoder_moe current=mlp" in line


@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict"])
def test_damaged_checkpoint_on_the_command_line(trained, capsys, command):
    content = bytearray(trained.read_bytes())
    content[len(content) // 2] ^= 4
    trained.write_bytes(content)
    line = error_line(capsys, command, f"--ckpt_path={trained}", tiny=TRAINER)
    assert f"{trained} is damaged" in line


def test_unknown_stored_configuration_is_one_line(trained, capsys):
    checkpoint = load_checkpoint(trained)
    checkpoint["run_config"] = "model: {name: decoder_moe, foo: 1}\n"
    save_checkpoint(checkpoint, trained)
    assert "model.foo" in error_line(capsys, "test", f"--ckpt_path={trained}", tiny=TRAINER)


@pytest.mark.parametrize("command", ["fit", "validate"])
def test_a_checkpoint_of_another_program_is_not_called_damaged(folder, capsys, command):
    torch.save({"state_dict": {}, "global_step": 1, "pytorch-lightning_version": "2.6.6"}, "plain.ckpt")
    assert error_line(capsys, command, "--ckpt_path=plain.ckpt", tiny=TRAINER) == (
        "checkpoint: it must be written by moe_lightning, got plain.ckpt of torch.save or plain Lightning without a "
        "SHA-256 at its end; train one with train.py, or read it with torch.load if you trust it"
    )
