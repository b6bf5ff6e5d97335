"""ONNX folders next to checkpoints: one for each, with its weights, and none without."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import onnx
from torch import nn

from moe_lightning.export.directory import MODEL_FILE, PARAMS_FILE
from moe_lightning.export.model_files import TracedModel, checkpoint_metadata
from moe_lightning.export.moe_forms import with_weights
from moe_lightning.export.sources import network_state
from moe_lightning.utils.checkpoint_file import load_checkpoint
from moe_lightning.utils.files import atomic_symlink, remove_stale, remove_tree

Verify = Literal["first", "always", "never"]


def onnx_folder(checkpoint: Path) -> Path:
    """Where the model files of a checkpoint go: next to it, with `.onnx` for `.ckpt`."""
    return checkpoint.with_name(f"{checkpoint.name.removesuffix('.ckpt')}.onnx")


class CheckpointSync:
    """Keeps the ONNX folders of one model's checkpoints; the model is traced once.

    Args:
        network: the model, with or without weights of its own.
        verify: which model files are compared in onnxruntime. They have one graph, so by default the first alone.
    """

    def __init__(self, network: nn.Module, verify: Verify = "first") -> None:
        self._network = network
        self._verify = verify
        self._verified = False
        self._traced: TracedModel | None = None
        self._not_traceable: Exception | None = None
        self._written: dict[Path, str] = {}  # time of the checkpoint that a folder is of
        self._steps: dict[Path, tuple[str, int]] = {}  # time and step of checkpoints that were read

    def update(self, home: Path, checkpoints: Iterable[Path], best: Path | None, last: Path | None) -> None:
        """Export the new ones, drop folders without a checkpoint, and set the links `best` and `last` in `home`.

        A last checkpoint of the same step as another shares its folder. Where an export fails the others are done
        nevertheless; then its error is raised.
        """
        home, own = home.resolve(), list(dict.fromkeys(path.resolve() for path in checkpoints))
        last = None if last is None else last.resolve()  # it may be a link
        alias = None if last is None else self._same_step(last, own)
        wanted = [*own, *([last] if last is not None and alias is None else [])]
        errors = [error for error in map(self._export, wanted) if error is not None]
        for name, path in (("best", best), ("last", alias or last)):
            folder = None if path is None else onnx_folder(path.resolve())
            _link(home / name, folder if folder in self._written else None)
        used = {folder for folder in map(onnx_folder, wanted) if folder in self._written}
        for parent in {home, *(path.parent for path in own)}:
            self._drop(parent, used, last)
        if errors:
            raise errors[0]

    def _export(self, checkpoint: Path) -> Exception | None:
        """Write the model files of a checkpoint, unless they are there already; the error, if it fails."""
        folder, written = onnx_folder(checkpoint), _written(checkpoint)
        metadata = {"checkpoint": checkpoint.name, "written": written}
        if self._written.get(folder) != written or not folder.exists():
            self._written.pop(folder, None)
            if not metadata.items() <= _metadata(folder).items():
                try:
                    self._write(checkpoint, folder, metadata)
                except Exception as error:
                    return error
            self._written[folder] = written
        return None

    def _write(self, checkpoint: Path, folder: Path, metadata: dict[str, str]) -> None:
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
        self._traced.write(folder, verify=verify, metadata={**checkpoint_metadata(content), **metadata})
        self._verified |= verify

    def _same_step(self, last: Path, others: list[Path]) -> Path | None:
        """The newest of the other checkpoints that is of the same step."""
        if last in others:
            return last
        step = self._step(last)
        return next((path for path in reversed(others) if self._step(path) == step), None)

    def _step(self, checkpoint: Path) -> int:
        written = _written(checkpoint)
        if checkpoint not in self._steps or self._steps[checkpoint][0] != written:
            self._steps[checkpoint] = written, _read(checkpoint)["global_step"]
        return self._steps[checkpoint][1]

    def _drop(self, home: Path, used: set[Path], last: Path | None) -> None:
        """Remove folders of no checkpoint, or of a former last one; one that holds other files is left alone."""
        remove_stale(home)
        for folder in home.glob("*.onnx"):
            checkpoint = folder.with_suffix(".ckpt")
            if folder in used or folder.is_symlink() or (checkpoint.exists() and checkpoint != last):
                continue
            ours = _metadata(folder).get("checkpoint") == checkpoint.name
            if ours and set(os.listdir(folder)) == {MODEL_FILE, PARAMS_FILE}:
                self._written.pop(folder, None)
                remove_tree(folder)


def _read(checkpoint: Path) -> dict[str, Any]:
    """Verified; a plain Trainer's file has no digest."""
    return load_checkpoint(checkpoint, require_digest=False, mmap=True)


def _written(checkpoint: Path) -> str:
    return str(checkpoint.stat().st_mtime_ns)


def _metadata(folder: Path) -> dict[str, str]:
    """Of the graph in a folder; empty where there is none."""
    if not (folder / MODEL_FILE).is_file():
        return {}
    graph = onnx.load(folder / MODEL_FILE, format="protobuf", load_external_data=False)
    return {entry.key: entry.value for entry in graph.metadata_props}


def _link(link: Path, folder: Path | None) -> None:
    """Atomically; the link is removed if there is no folder."""
    if os.path.lexists(link) and not link.is_symlink():
        raise ValueError(f"export: {link.name} must be a symbolic link to an ONNX folder, got {link}; move it away")
    if folder is None:
        link.unlink(missing_ok=True)
        return
    atomic_symlink(link, folder)
