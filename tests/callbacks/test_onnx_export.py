"""Checkpoints of a tiny run and their ONNX folders: which are there, whose weights they hold, what a failure leaves."""

import errno
import os
import signal
import subprocess
import sys
import warnings
from contextlib import nullcontext
from pathlib import Path

import lightning as L
import onnx
import pytest
import torch
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from onnx import numpy_helper
from tiny_fit import fit, tiny_model
from tiny_run import DATA, SIZES, TRAINER, run_cli

from moe_lightning.callbacks import GracefulStop, OnnxExport, RunCheckpoint
from moe_lightning.export import checkpoint_sync, model_files
from moe_lightning.export.agreement import compare, open_session
from moe_lightning.export.model_files import TracedModel
from moe_lightning.utils.files import HOST

DENSE = ["--model=transformer_decoder"]
DENSE += [f"--model.{name}={size}" for name, size in SIZES.items() if name not in ("num_experts", "top_k")]
#: Of the steps; the smallest is best.
SCORES = [3.0, 2.0, 4.0, 1.0, 5.0, 6.0]


class Score(L.Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        pl_module.log("score", SCORES[trainer.global_step])


class Watch(Checkpoint):
    """Looks at the folder after the export: Lightning calls a `Checkpoint` last."""

    def __init__(self, folder):
        self.folder = folder
        self.seen = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        links = {path.name: os.readlink(path) for path in self.folder.iterdir() if path.is_symlink()}
        pairs = {path.stem: weights(path) for path in self.folder.glob("*.onnx")}
        stored = {path.stem: torch.load(path)["state_dict"] for path in self.folder.glob("*.ckpt")}
        self.seen.append((links, pairs, stored))


def weights(folder):
    """By the names of a state dict; experts stacked again."""
    graph = onnx.load(folder / "__model__", load_external_data=False).graph
    found = {i.name: torch.tensor(numpy_helper.to_array(i, str(folder))) for i in graph.initializer}
    found = {name: value for name, value in found.items() if name.startswith("network.")}
    experts = {}
    for name in sorted(name for name in found if ".experts." in name):
        stem, number, which = name.rsplit(".", 2)
        assert int(number) == len(experts.setdefault(f"{stem}.{which}", []))
        experts[f"{stem}.{which}"].append(found.pop(name))
    return found | {name: torch.stack(parts) for name, parts in experts.items()}


def assert_same_weights(pair, stored):
    assert pair.keys() == stored.keys()
    assert [name for name, value in stored.items() if not torch.equal(pair[name], value)] == []


def trained(folder, *extra, steps=6, save=None, **options):
    """A run that saves after every step, and its callbacks."""
    save = {"monitor": "score", "filename": "{step}", "save_last": True, "every_n_train_steps": 1, **(save or {})}
    checkpoints = ModelCheckpoint(folder, **save)
    _, trainer, model = fit(
        [Score(), checkpoints, *extra],
        batches=3,
        max_epochs=steps // 3,
        enable_checkpointing=True,
        logger=False,
        **options,
    )
    assert trainer.global_step == steps
    return model


@pytest.fixture(scope="module")
def traced():
    """The one trace that all runs share."""
    return TracedModel(tiny_model().network)


@pytest.fixture(autouse=True)
def one_trace(traced, monkeypatch):
    def give(network):
        traced.load(network.state_dict())
        return traced

    monkeypatch.setattr(checkpoint_sync, "TracedModel", give)


@pytest.fixture
def full_disk(monkeypatch):
    """`full_disk(*numbers)`: those writes of a pair, counted from one, break off."""

    def break_off(*numbers):
        calls = []

        def save(graph, path, external_data):
            whole(graph, path, external_data=external_data)
            calls.append(path)
            if len(calls) in numbers:
                os.truncate(path, 100)
                raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(model_files.onnx_ir, "save", save)

    whole = model_files.onnx_ir.save
    return break_off


def test_folders_follow_the_checkpoints(tmp_path):
    watch = Watch(tmp_path)
    trained(tmp_path, OnnxExport(verify="always"), watch)
    expected = [  # best, last, folders
        ("step=1", "step=1", {"step=1"}),
        ("step=2", "step=2", {"step=2"}),
        ("step=2", "last", {"step=2", "last"}),
        ("step=4", "step=4", {"step=4"}),
        ("step=4", "last", {"step=4", "last"}),
        ("step=4", "last", {"step=4", "last"}),
    ]
    for (links, pairs, stored), (best, last, folders) in zip(watch.seen, expected, strict=True):
        assert links == {"best": f"{best}.onnx", "last": f"{last}.onnx"}
        assert pairs.keys() == folders
        assert stored.keys() == folders | {"last"}
        for name in folders:
            assert_same_weights(pairs[name], stored[name])
    assert not list(tmp_path.glob(".*.tmp"))
    network = tiny_model().network.eval()
    network.load_state_dict({name.removeprefix("network."): value for name, value in stored["step=4"].items()})
    assert compare(open_session(tmp_path / "best"), network, torch.randint(0, 64, (2, 5))) <= 1e-5


@pytest.mark.parametrize("end", ["steps", "SIGTERM", "exception"])
def test_the_last_folder_is_of_the_newest_state_however_the_run_ended(tmp_path, end):
    """Though the best checkpoint is an older one."""

    class End(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.global_step == 5 and end == "SIGTERM":
                os.kill(os.getpid(), signal.SIGTERM)
            if trainer.global_step == 6 and end == "exception":
                raise RuntimeError("power cut")

    save = RunCheckpoint(tmp_path, "{step}", monitor="val/loss", save_last=True)
    callbacks = [GracefulStop(), End(), save, OnnxExport()]
    ends = {"steps": nullcontext(), "SIGTERM": pytest.raises(SystemExit), "exception": pytest.raises(RuntimeError)}
    model = tiny_model()
    model.optimizer_config.learning_rate = 1.0  # ever worse
    with ends[end]:
        fit(
            *(callbacks, model, 8, 1),
            **{"max_steps": 6 if end == "steps" else 8, "val_check_interval": 2, "enable_checkpointing": True},
        )
    stored = torch.load(tmp_path / "last.ckpt")
    assert stored["global_step"] == 6
    assert os.readlink(tmp_path / "best") != os.readlink(tmp_path / "last")
    assert_same_weights(weights(tmp_path / os.readlink(tmp_path / "last")), stored["state_dict"])


def test_training_is_the_same_with_it_and_a_resumed_run_goes_on(tmp_path):
    alone = trained(tmp_path / "alone").state_dict()
    trained(tmp_path / "both", OnnxExport(), steps=3)
    killed = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    for pid in (killed.stdout.strip(), os.getpid()):
        (tmp_path / f"both/.abc.{HOST}-{pid}.tmp").mkdir()
    watch = Watch(tmp_path / "both")

    class Resume(L.Trainer):
        def fit(self, *arguments):
            return super().fit(*arguments, ckpt_path=tmp_path / "both/last.ckpt")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(L, "Trainer", Resume)
        resumed = trained(tmp_path / "both", OnnxExport(), watch)
    assert watch.seen[0][0] == {"best": "step=4.onnx", "last": "step=4.onnx"}
    assert sorted(path.name for path in (tmp_path / "both").iterdir()) == [
        f".abc.{HOST}-{os.getpid()}.tmp",  # of a process that runs
        *("best", "last", "last.ckpt", "last.onnx", "step=4.ckpt", "step=4.onnx"),
    ]
    assert [name for name, value in resumed.state_dict().items() if not torch.equal(value, alone[name])] == []


def test_what_is_there_already_is_not_written_again(tmp_path):
    trained(tmp_path, OnnxExport(), steps=3)
    path = tmp_path / "step=2.onnx/__model__"
    before = path.stat()
    again = checkpoint_sync.CheckpointSync(torch.nn.Module())  # could not write anything
    again.update(tmp_path, [tmp_path / "step=2.ckpt"], tmp_path / "step=2.ckpt", None)
    assert path.stat().st_mtime_ns == before.st_mtime_ns
    assert not os.path.lexists(tmp_path / "last")
    (tmp_path / "step=2.ckpt").unlink()
    (tmp_path / "mine.onnx").mkdir()
    (tmp_path / "mine.onnx/__model__").write_bytes(path.read_bytes())
    again.update(tmp_path, [], None, None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last.ckpt", "last.onnx", "mine.onnx"]


def test_links_of_lightning_are_followed(tmp_path):
    trained(tmp_path, OnnxExport(), steps=3, save={"save_last": "link"})
    assert (tmp_path / "last.ckpt").is_symlink()
    assert os.readlink(tmp_path / "last") == "step=2.onnx"


def test_an_export_that_fails_is_told_once_and_tried_again(tmp_path, full_disk):
    full_disk(1, 2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        watch = Watch(tmp_path)
        trained(tmp_path, OnnxExport(), watch)
    [said] = [str(warning.message) for warning in caught if "onnx_export" in str(warning.message)]
    assert "\n" not in said
    assert "training goes on without the ONNX folder of a checkpoint, got" in said
    assert "must fit on the disk and be allowed there, got No space left on device" in said
    assert [(links, set(pairs)) for links, pairs, _ in watch.seen[:3]] == [
        ({}, set()),
        ({}, set()),
        ({"best": "step=2.onnx", "last": "last.onnx"}, {"step=2", "last"}),
    ]
    assert not list(tmp_path.glob(".*.tmp"))


def test_a_last_pair_that_cannot_be_renewed_goes(tmp_path, full_disk):
    full_disk(6)  # of last.ckpt at step 6
    with pytest.warns(UserWarning, match="onnx_export: training goes on"):
        trained(tmp_path, OnnxExport(), steps=6)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best", "last.ckpt", "step=4.ckpt", "step=4.onnx"]


def test_an_export_that_fails_can_end_the_run(tmp_path, full_disk):
    full_disk(1)
    with pytest.raises(ValueError, match=r"^onnx_export: every checkpoint must become an ONNX folder, got .*No space"):
        trained(tmp_path, OnnxExport(on_error="raise"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last.ckpt", "step=1.ckpt"]


def test_a_model_that_cannot_be_traced_is_not_traced_again(tmp_path, monkeypatch):
    calls = []

    def fail(network):
        calls.append(network)
        raise RuntimeError("no\nONNX for this")

    monkeypatch.setattr(checkpoint_sync, "TracedModel", fail)
    with pytest.warns(UserWarning, match=r"got RuntimeError: no ONNX for this$"):
        trained(tmp_path, OnnxExport())
    assert len(calls) == 1
    assert not list(tmp_path.glob("*.onnx"))


def test_a_folder_named_best_is_left_alone(tmp_path):
    (tmp_path / "best").mkdir()
    with pytest.raises(ValueError, match="best must be a symbolic link to an ONNX folder"):
        trained(tmp_path, OnnxExport(on_error="raise"), steps=3)
    assert (tmp_path / "best").is_dir()


@pytest.mark.parametrize("callbacks", [lambda save: [OnnxExport(), save], lambda save: [OnnxExport()]])
def test_it_stands_behind_a_model_checkpoint(tmp_path, callbacks):
    with pytest.raises(ValueError, match="onnx_export: one ModelCheckpoint must come before it"):
        fit(callbacks(ModelCheckpoint(tmp_path)), enable_checkpointing=True)


@pytest.mark.parametrize(("name", "value"), [("on_error", "wran"), ("verify", "last")])
def test_bad_arguments(name, value):
    with pytest.raises(ValueError, match=f"onnx_export: {name} must be one of"):
        OnnxExport(**{name: value})


@pytest.mark.slow
@pytest.mark.parametrize("model", [["--model=mlp", "--model.d_model=16"], DENSE], ids=["mlp", "transformer_decoder"])
def test_a_run_names_its_onnx_folder(model, folder, capsys, monkeypatch):
    monkeypatch.setattr(checkpoint_sync, "TracedModel", TracedModel)
    flags = ["--onnx_export.enabled=true", "--onnx_export.on_error=raise", "--trainer.logger=false"]
    run_cli("fit", *flags, "--trainer.max_steps=2", "--trainer.val_check_interval=2", tiny=[*model, *DATA, *TRAINER])
    printed = capsys.readouterr().out
    [named] = [line.split()[1] for line in printed.splitlines() if line.startswith("onnx: ")]
    [checkpoint] = [line.split()[1] for line in printed.splitlines() if line.startswith("checkpoint: ")]
    assert Path(named) == Path(checkpoint).with_suffix(".onnx")
    assert_same_weights(weights(Path(named)), torch.load(checkpoint)["state_dict"])


@pytest.mark.parametrize("flag", ["--trainer.fast_dev_run=true", "--trainer.enable_checkpointing=false"])
def test_nothing_to_export(flag, folder):
    run_cli("fit", "--onnx_export.enabled=true", "--trainer.max_steps=1", flag)
    assert not list(folder.glob("**/*.onnx"))
