"""ONNX folders next to checkpoints: one for each, with its weights, and none without."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import onnx
import torch
from torch import nn

from moe_lightning.export.directory import MODEL_FILE, PARAMS_FILE
from moe_lightning.export.model_files import TracedModel, checkpoint_facts
from moe_lightning.export.moe_forms import with_weights
from moe_lightning.export.sources import network_state
from moe_lightning.utils.files import atomic_symlink, remove_stale, remove_tree

Verify = Literal["first", "always", "never"]


def onnx_folder(checkpoint: Path) -> Path:
    """Where the pair of a checkpoint goes: beside it, with `.onnx` for `.ckpt`."""
    return checkpoint.with_name(f"{checkpoint.name.removesuffix('.ckpt')}.onnx")


class CheckpointMirror:
    """Keeps the ONNX folders of one model's checkpoints; the model is traced once.

    Args:
        network: the model, with or without weights of its own.
        verify: which pairs are compared in onnxruntime. They have one graph, so by default the first alone.
    """

    def __init__(self, network: nn.Module, verify: Verify = "first") -> None:
        self._network = network
        self._verify = verify
        self._verified = False
        self._traced: TracedModel | None = None
        self._not_traceable: Exception | None = None
        self._written: dict[Path, str] = {}  # time of the checkpoint that a folder is of

    def update(self, home: Path, checkpoints: Iterable[Path], best: Path | None, last: Path | None) -> None:
        """Export the new ones, drop folders whose checkpoint is gone, and set the links `best` and `last` in `home`.

        A last checkpoint of the same step as another shares its folder. Where an export fails the others are done
        nevertheless; then its error is raised.
        """
        home, own = home.resolve(), list(dict.fromkeys(path.resolve() for path in checkpoints))
        last = None if last is None else last.resolve()  # it may be a link
        twin = None if last is None else _twin(last, own)
        wanted = [*own, *([last] if last is not None and twin is None else [])]
        errors = [error for error in map(self._export, wanted) if error is not None]
        for name, path in (("best", best), ("last", twin or last)):
            folder = None if path is None else onnx_folder(path.resolve())
            _link(home / name, folder if folder in self._written else None)
        used = {folder for folder in map(onnx_folder, wanted) if folder in self._written}
        for parent in {home, *(path.parent for path in own)}:
            self._drop(parent, used, last)
        if errors:
            raise errors[0]

    def _export(self, checkpoint: Path) -> Exception | None:
        """The pair of a checkpoint, unless it is there already; what went wrong."""
        folder, written = onnx_folder(checkpoint), str(checkpoint.stat().st_mtime_ns)
        facts = {"checkpoint": checkpoint.name, "written": written}
        if self._written.get(folder) != written or not folder.exists():
            self._written.pop(folder, None)
            if not facts.items() <= _facts(folder).items():
                try:
                    self._write(checkpoint, folder, facts)
                except Exception as error:
                    return error
            self._written[folder] = written
        return None

    def _write(self, checkpoint: Path, folder: Path, facts: dict[str, str]) -> None:
        if self._not_traceable is not None:
            raise self._not_traceable
        content = _read(checkpoint)
        state = network_state(content)
        if self._traced is None:
            try:
                self._traced = TracedModel(with_weights(self._network, state))
            except Exception as error:
                self._not_traceable = error  # it takes too long to be tried every time
                raise
        else:
            self._traced.load(state)
        verify = self._verify == "always" or (self._verify == "first" and not self._verified)
        self._traced.write(folder, verify=verify, facts={**checkpoint_facts(content), **facts})
        self._verified |= verify

    def _drop(self, home: Path, used: set[Path], last: Path | None) -> None:
        """Remove folders of no checkpoint, or of a former last one; one that holds other files is left alone."""
        remove_stale(home)
        for folder in home.glob("*.onnx"):
            checkpoint = folder.with_suffix(".ckpt")
            if folder in used or folder.is_symlink() or (checkpoint.exists() and checkpoint != last):
                continue
            ours = _facts(folder).get("checkpoint") == checkpoint.name
            if ours and set(os.listdir(folder)) == {MODEL_FILE, PARAMS_FILE}:
                self._written.pop(folder, None)
                remove_tree(folder)


def _read(checkpoint: Path) -> dict[str, Any]:
    """Only what is looked at comes from the disk."""
    return torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)


def _twin(last: Path, others: list[Path]) -> Path | None:
    """Another checkpoint of the same step, of which the newest stands at the end."""
    if last in others:
        return last
    step = _read(last)["global_step"]
    return next((path for path in reversed(others) if _read(path)["global_step"] == step), None)


def _facts(folder: Path) -> dict[str, str]:
    """What the graph of a pair says of its checkpoint; nothing if there is no pair, or another's."""
    if not (folder / MODEL_FILE).is_file():
        return {}
    graph = onnx.load(folder / MODEL_FILE, format="protobuf", load_external_data=False)
    return {fact.key: fact.value for fact in graph.metadata_props}


def _link(link: Path, folder: Path | None) -> None:
    """From one moment to the next; none if there is nothing to lead to."""
    if os.path.lexists(link) and not link.is_symlink():
        raise ValueError(f"export: {link.name} must be a symbolic link to an ONNX folder, got {link}; move it away")
    if folder is None:
        link.unlink(missing_ok=True)
        return
    atomic_symlink(link, folder)
