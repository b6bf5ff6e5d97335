"""Configurations: short names in place of class paths, prompts as they were typed, and limits for YAML.

    model: {name: decoder_moe, d_model: 128, router: {name: sinkhorn, iterations: 10}}

becomes the class_path and init_args that jsonargparse reads. A value with a dot is a class path and stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import yaml
from lightning import LightningModule

from moe_lightning.data.datamodule import check_prompts
from moe_lightning.routers import router_class
from moe_lightning.training.modules import DecoderMoEModule, MLPModule, TransformerDecoderModule
from moe_lightning.utils.checks import check_choice

MODELS: dict[str, type[LightningModule]] = {
    "mlp": MLPModule,
    "transformer_decoder": TransformerDecoderModule,
    "decoder_moe": DecoderMoEModule,
}


def model_class(name: str) -> type[LightningModule]:
    """Look a model up by its name; the error for an unknown one offers the near matches."""
    check_choice("model", "name", name, MODELS)
    return MODELS[name]


def expand_config(config: Any) -> Any:
    """A configuration with the names under `model` and `model.router` expanded; anything else is left alone."""
    if not isinstance(config, dict) or config.get("model") is None:
        return config
    model = _expand(config["model"], model_class)
    arguments = model.get("init_args", {})
    if arguments.get("router") is not None:
        arguments["router"] = _expand(arguments["router"], router_class)
    return {**config, "model": model}


#: Flags whose value is a short name, with what finds its class.
_NAMED: dict[str, Callable[[str], type]] = {
    "--model": model_class,
    "--model.router": router_class,
}
#: Each use of one is a prompt.
PROMPT_FLAGS = ("--data.prompt", "--data.prompt+")


def expand_arguments(arguments: list[str]) -> list[str]:
    """Command-line arguments with class paths for the names of models and routers, and all prompts in one YAML list.

    A prompt is the text as it is, also where YAML or argparse would see something else in it ("[1, 2]", "null", "-h").
    """
    expanded: list[str] = []
    prompts: list[str] = []
    remaining = iter(arguments)
    for argument in remaining:
        flag, equals, value = argument.partition("=")
        if not equals and (flag in _NAMED or flag in PROMPT_FLAGS):
            following = next(remaining, None)
            if following is None:
                expanded.append(flag)  # the parser's error: a value is missing
                break
            value = following
        if flag in PROMPT_FLAGS:
            prompts.append(value)
        elif flag in _NAMED:
            path = class_path(value, _NAMED[flag])
            expanded += [f"{flag}={path}"] if equals else [flag, path]
        else:
            expanded.append(argument)
    if prompts:
        expanded.append(f"{PROMPT_FLAGS[0]}={_quoted(check_prompts(prompts))}")
    return expanded


def class_path(name: str, lookup: Callable[[str], type]) -> str:
    """The import path of a name; a name with a dot is one already."""
    if not isinstance(name, str):
        raise ValueError(f"config: the name of a model or router must be text, got {name!r}")
    if "." in name or name in ("null", "None"):
        return name
    kind = lookup(name)
    return f"{kind.__module__}.{kind.__qualname__}"


def _quoted(texts: list[str]) -> str:
    """A list of strings in YAML, whatever is in them."""
    return yaml.safe_dump(texts, default_style='"', default_flow_style=True, width=float("inf")).strip()


def _expand(value: Any, lookup: Callable[[str], type]) -> dict[str, Any]:
    if isinstance(value, str):
        return {"class_path": class_path(value, lookup)}
    if not isinstance(value, dict):
        raise ValueError(f"config: a model or router must be a name or a mapping, got {value!r}")
    value = dict(value)
    if "class_path" in value:
        return {**value, "class_path": class_path(value["class_path"], lookup)}
    if "init_args" in value:
        return value
    name = value.pop("name", None)
    return {**({"class_path": class_path(name, lookup)} if name else {}), "init_args": value}


#: A configuration of all classes and callbacks has under a thousand values, in a dozen levels.
MOST_VALUES = 100_000
MOST_LEVELS = 100

_PARSER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def bounded(load: Callable[[str], Any]) -> Callable[[str], Any]:
    """`load` for YAML text that raises ValueError where it is too deep or, aliases written out, too large.

    A few lines of aliases can be more values than a machine has memory for.
    """

    def load_bounded(text: str) -> Any:
        _check_size(text)
        return load(text)

    return load_bounded


def _check_size(text: str) -> None:
    """Goes by the parser's events: what builds a tree is recursive, and libyaml's ends in a segmentation fault."""
    anchors: dict[str, tuple[float, int]] = {}  # name -> values and levels; endless while the anchor is open
    open_nodes: list[tuple[str | None, float, int]] = [(None, 0, 0)]
    for event in yaml.parse(text, Loader=_PARSER):
        if isinstance(event, yaml.CollectionStartEvent):
            if event.anchor:
                anchors[event.anchor] = (float("inf"), 0)
            open_nodes.append((event.anchor, 1, 1))
            _check_levels(len(open_nodes))
            continue
        if isinstance(event, yaml.CollectionEndEvent):
            name, values, levels = open_nodes.pop()
        elif isinstance(event, yaml.AliasEvent):
            name, (values, levels) = None, anchors.get(event.anchor or "", (1, 0))
        elif isinstance(event, yaml.ScalarEvent):
            name, values, levels = event.anchor, 1, 0
        else:
            continue
        if name:
            anchors[name] = values, levels
        around, values_around, levels_around = open_nodes.pop()
        open_nodes.append((around, values_around + values, max(levels_around, levels + 1)))
        _check_levels(levels)
        if values_around + values > MOST_VALUES:
            raise ValueError(
                f"config: YAML must have at most {MOST_VALUES} values, got more, aliases (*name) counted; write less"
            )


def _check_levels(levels: int) -> None:
    if levels > MOST_LEVELS:
        raise ValueError(f"config: YAML must have at most {MOST_LEVELS} levels, got more; nest less deeply")
