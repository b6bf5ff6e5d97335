"""Checkpoints in Lightning: verified files, and which settings are the checkpoint's, which the command line's.

Model, optimizer, losses and data are the checkpoint's, whatever is in a configuration file. A flag changes them where
they can change, and each change is logged once. Other sections (trainer, callbacks) are the command line's, as in
Lightning.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from typing_extensions import override

from moe_lightning.models.hyperparameters import stored_config
from moe_lightning.routers import ROUTERS
from moe_lightning.training.config import MODELS
from moe_lightning.utils.checkpoint_file import load_checkpoint, save_checkpoint


class VerifiedCheckpointIO(TorchCheckpointIO):
    """Atomic save (temporary file, fsync, rename) with a digest; load verifies it and unpickles weights only."""

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Write `checkpoint` so that `path` is, at every moment, the old file or the whole new one."""
        save_checkpoint(checkpoint, path)

    @override
    def load_checkpoint(
        self, path: str | Path, map_location: Any | None = "cpu", weights_only: bool | None = True
    ) -> dict[str, Any]:
        """Read a verified file; `weights_only` cannot be switched off."""
        return load_checkpoint(path, map_location or "cpu")


#: Settings of a call, not of a run: a file sets them as a flag does, and nothing is logged.
CALL_SETTINGS = {"model": ("max_new_tokens", "temperature"), "data": ("cache_dir", "num_workers", "prompt")}

_SHORT_NAMES = {kind.__name__: name for named in (ROUTERS, MODELS) for name, kind in named.items()}


class Difference(NamedTuple):
    """A setting by its name on the command line, the value it had, and the one on the command line."""

    name: str
    saved: Any
    current: Any


class Resume:
    """The settings of one checkpoint, for one command.

    Args:
        command: fit, validate, test or predict.
        path: of the checkpoint.

    Raises:
        ValueError: the file is missing or damaged.
    """

    def __init__(self, command: str, path: str) -> None:
        checkpoint = load_checkpoint(path)
        self.path = path
        #: The model and data sections, those of them that the checkpoint holds.
        self.stored = stored_config(checkpoint)
        self._place = _place(checkpoint) if command == "fit" else {}
        self._fixed = {"model", "data.tokenizer", "data.vocab_size"}
        self._fixed |= {f"model.{name}" for name in checkpoint.get("architecture") or {}}
        if self._place:
            self._fixed |= {"data.seq_len", "data.seed"}
        self._of_files: dict[str, Any] = {}

    def without_stored(self, content: dict[str, Any]) -> dict[str, Any]:
        """A configuration file's content, expanded, less what is the checkpoint's; that is kept to be compared."""
        rest = {name: section for name, section in content.items() if name not in self.stored}
        for name in self.stored:
            section = content.get(name)
            if not isinstance(section, dict):
                rest |= {name: section} if section is not None else {}  # the parser refuses it
                continue
            self._of_files = _merged(self._of_files, {name: section})
            arguments = section.get("init_args", section)
            of_call = {key: arguments[key] for key in CALL_SETTINGS[name] if key in arguments}
            if of_call:
                rest[name] = {"init_args": of_call} if name == "model" else of_call
        return rest

    def check(self, saved: Mapping[str, Any], current: Mapping[str, Any]) -> None:
        """Refuse what cannot change, and log once what flags change and what files would have changed.

        Args:
            saved: the configuration of the checkpoint alone, completed by the parser.
            current: that of the command line.
        """
        saved, current = ({name: config[name] for name in self.stored} for config in (saved, current))
        changed = [d for d in differences(saved, current) if not _of_call(d.name)]
        refused = [d for d in changed if d.name in self._fixed]
        if refused:
            listed = ", ".join(f"{d.name} saved={d.saved} current={d.current}" for d in refused)
            raise ValueError(
                f"checkpoint: these settings of {self.path} cannot change, got {listed}; leave the flags out, or train "
                "again without ckpt_path"
            )
        if changed:
            listed = ", ".join(f"{d.name} {d.saved} -> {d.current}" for d in changed)
            rank_zero_info(f"checkpoint: flags change the settings of {self.path}: {listed}")
        ignored = [d for d in differences(saved, self._of_files, partial=True) if not _of_call(d.name)]
        ignored = [d for d in ignored if d.name not in {c.name for c in changed}]
        if ignored:
            listed = ", ".join(f"{d.name} {d.saved} (not {d.current})" for d in ignored)
            rank_zero_info(f"checkpoint: the settings of {self.path} hold, not those of configuration files: {listed}")

    def check_batch_size(self, batch_size: int, world_size: int) -> None:
        """Refuse batches that the saved place in the data is no place in, before any data is read."""
        saved = self._place.get("global_batch_size", batch_size * world_size)
        if batch_size * world_size != saved:
            raise ValueError(
                f"checkpoint: data.batch_size x devices of {self.path} cannot change, got saved={saved} "
                f"current={batch_size} x {world_size}; set data.batch_size and trainer.devices to give {saved}"
            )


def differences(saved: Any, current: Any, name: str = "", partial: bool = False) -> Iterator[Difference]:
    """Settings that differ between two configurations, in order; of two classes only the classes.

    Args:
        saved: as the parser dumps it, without its vocabulary.
        current: the same; `partial`: what it leaves out does not differ.
        name: of both.
    """
    if not (isinstance(saved, Mapping) and isinstance(current, Mapping)):
        if saved != current:
            yield Difference(name, saved, current)
        return
    classes = [_class_name(value.get("class_path")) for value in (saved, current)]
    if classes[0] != classes[1] and not (partial and classes[1] is None):
        yield Difference(name, *classes)
        return
    for key in [*saved, *(key for key in current if key not in saved)]:
        if key == "class_path" or (key not in current and partial):
            continue
        inner = name if key in ("init_args", "dict_kwargs") else f"{name}.{key}".lstrip(".")
        yield from differences(saved.get(key), current.get(key), inner, partial)


def _class_name(path: str | None) -> str | None:
    """The short name of a class, or its own."""
    name = path.rpartition(".")[2] if path else None
    return _SHORT_NAMES.get(name, name) if name else None


def _merged(first: dict[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """Configurations stacked as the parser stacks them: another class drops the arguments of the one before."""
    merged = dict(first)
    for key, value in second.items():
        old = merged.get(key)
        if isinstance(old, dict) and isinstance(value, Mapping):
            same_class = value.get("class_path") in (None, old.get("class_path"))
            value = _merged(old, value) if same_class else value
        merged[key] = value
    return merged


def _of_call(name: str) -> bool:
    section, _, field = name.partition(".")
    return field in CALL_SETTINGS[section]


def _place(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Where training was in its data, as the train loader stores it; empty if it was no such loader."""
    loops = checkpoint.get("loops") or {}
    states = loops.get("fit_loop", {}).get("state_dict", {}).get("combined_loader", [])
    return next((state for state in states if isinstance(state, dict) and "global_batch_size" in state), {})


def checkpoint_path(value: Any, folder: Any) -> str | None:
    """The file that `--ckpt_path` names, Lightning's `last` included: the newest of the folder of checkpoints.

    None where there is none yet, and for the words that Lightning alone can resolve (best, hpc, registry).
    """
    if not isinstance(value, str):
        return None  # the parser's to refuse
    if value == "last" and isinstance(folder, str):
        saved = sorted(Path(folder).glob("last*.ckpt"), key=lambda path: path.stat().st_mtime)
        return str(saved[-1]) if saved else None
    return None if value in ("best", "last", "hpc", "null", "registry") else value
