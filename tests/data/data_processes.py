"""What the tests run in other processes, imported there."""

import json
from multiprocessing.connection import Connection
from pathlib import Path

import lightning as L
import torch

from moe_lightning.data import prepare
from moe_lightning.data.cache import build_once


def prepare_and_report(pipe: Connection, path: str, cache_dir: str) -> None:
    """Wait for the start signal, prepare, and send what came out and what it took."""
    work = []
    for name in ("train_bpe", "write_tokens"):
        step = getattr(prepare, name)
        setattr(prepare, name, lambda *args, name=name, step=step: (work.append(name), step(*args))[1])
    pipe.send("ready")
    pipe.recv()
    text = prepare.prepare_text(path, "bpe", 300, cache_dir)
    pipe.send((work, text.fingerprint, text.tokens["train"].tolist()))


def prepare_and_measure(pipe: Connection, path: str, cache_dir: str) -> None:
    """Prepare, and send by how many bytes of memory of its own the process grew at most."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = _kilobytes("RssAnon")
    prepare.prepare_text(path, "bytes", 257, cache_dir)
    pipe.send((_kilobytes("VmHWM") - _kilobytes("RssFile") - before) * 1024)


def _kilobytes(name: str) -> int:
    return int(Path("/proc/self/status").read_text().split(f"{name}:")[1].split()[0])


def hang_in_build(pipe: Connection, path: str) -> None:
    """Start to write, say so, and never finish."""

    def build(file) -> None:
        file.write(b"half")
        file.flush()
        pipe.send("writing")
        pipe.recv()

    build_once(Path(path), Path.exists, build)


class RankRecorder(L.LightningModule):
    """Writes the batches and prompts of each rank to ``folder/rank.json``."""

    def __init__(self, folder: str):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))
        self.folder = folder
        self.seen: dict[str, list] = {"train": [], "validation": [], "prompts": []}

    def training_step(self, batch):
        self.seen["train"].append(batch.tolist())
        return self.weight * batch.float().mean()

    def validation_step(self, batch):
        self.seen["validation"].append(batch.tolist())

    def on_train_end(self):
        data = self.trainer.datamodule
        self.seen["prompts"] = [data.decode(batch[0]) for batch in data.predict_dataloader()]

    def teardown(self, stage):
        Path(self.folder, f"{self.global_rank}.json").write_text(json.dumps(self.seen))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.0)
