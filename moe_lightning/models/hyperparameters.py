"""The settings of a run in its checkpoint: written as plain types, read back as arguments.

A checkpoint holds them as Lightning's hyper_parameters (the module's arguments) and datamodule_hyper_parameters. One of
before holds `run_config` instead, the model and data sections of its configuration as YAML text.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from functools import partial
from typing import Any

import yaml

from moe_lightning.models import RouterFactory

#: Modules that routers in checkpoints of before were in.
_MOVED = {
    f"moe_lightning.routers.{module}": "moe_lightning.routers.topk"
    for module in ("naive_topk", "fused_select", "masked_matmul")
}
#: Key of the module's import path among its hyperparameters; Lightning's own.
CLASS_PATH = "_class_path"


def plain_arguments(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments as types that `torch.load(weights_only=True)` reads: a class, or a partial of one, by its import path.

    An argument of another type is left out: it has to be given again to `load_from_checkpoint`.
    """
    plain = {name: _plain(value) for name, value in arguments.items()}
    return {name: value for name, value in plain.items() if value is not NotImplemented}


def stored_arguments(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """What the module of a checkpoint was made with, its class under `CLASS_PATH`; empty if it does not say."""
    if "run_config" not in checkpoint:
        stored = dict(checkpoint.get("hyper_parameters") or {})
        stored.pop("_instantiator", None)
        return _with_present_paths(stored)
    model = yaml.safe_load(checkpoint["run_config"])["model"]
    architecture = checkpoint.get("architecture") or {}
    vocab = {"vocab_size": architecture["vocab_size"]} if "vocab_size" in architecture else {}
    return _with_present_paths({CLASS_PATH: model["class_path"], **vocab, **(model.get("init_args") or {})})


def stored_config(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """The model and data sections of the configuration that a checkpoint's run had, without data where it was not ours;
    empty if the checkpoint is of another program."""
    if "run_config" in checkpoint:
        return _with_present_paths(yaml.safe_load(checkpoint["run_config"]))
    arguments = stored_arguments(checkpoint)
    if CLASS_PATH not in arguments:
        return {}
    path = arguments.pop(CLASS_PATH)
    arguments.pop("vocab_size", None)  # the data's
    config = {"model": {"class_path": path, "init_args": arguments}}
    if "TextDataModule" in checkpoint:
        data = checkpoint.get("datamodule_hyper_parameters") or {}
        config["data"] = {name: value for name, value in data.items() if not name.startswith("_")}
    return config


def router_factory(stored: Any) -> RouterFactory:
    """Makes the router that a configuration names, from (d_model, num_experts, top_k).

    Raises:
        ValueError: it names none that can be imported.
    """
    path = stored.get("class_path") if isinstance(stored, dict) else stored
    if not isinstance(path, str) or "." not in path:
        raise ValueError(f"checkpoint: its configuration must name a router, got {stored!r}")
    module, _, name = path.rpartition(".")
    try:
        kind = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"checkpoint: its router must be importable, got {path} ({error}); give router") from error
    arguments = stored.get("init_args") if isinstance(stored, dict) else None
    return partial(kind, **arguments) if arguments else kind


def _with_present_paths(stored: Any) -> Any:
    """Settings whose class paths are those of today."""
    if isinstance(stored, dict):
        return {name: _with_present_paths(value) for name, value in stored.items()}
    if isinstance(stored, str):
        module, _, name = stored.rpartition(".")
        return f"{_MOVED[module]}.{name}" if module in _MOVED else stored
    return stored


def argument_names(kind: type) -> set[str]:
    """What a class takes, by itself or for a parent."""
    inits = [vars(parent)["__init__"] for parent in kind.__mro__ if "__init__" in vars(parent)]
    return {name for init in inits for name in inspect.signature(init).parameters}


def _plain(value: Any) -> Any:
    """`value` as plain types, or NotImplemented."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if is_dataclass(value) and not isinstance(value, type):
        return _plain(asdict(value))
    if isinstance(value, Mapping):
        return plain_arguments(value)
    if isinstance(value, (list, tuple)):
        return [item for item in map(_plain, value) if item is not NotImplemented]
    if isinstance(value, partial) and not value.args:
        return {"class_path": import_path(value.func), "init_args": plain_arguments(value.keywords)}
    if callable(value) and hasattr(value, "__qualname__"):
        return {"class_path": import_path(value)}
    return NotImplemented


def import_path(named: Any) -> str:
    """Of a class or function."""
    return f"{named.__module__}.{named.__qualname__}"
