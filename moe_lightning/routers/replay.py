"""Choices of experts as plain tensors: recorded in a pass, taken again in another, with weights and gradients of today.

For reinforcement learning, whose training is to route as its sampler did (rollout routing replay, arXiv:2510.11370),
and for whoever asks what other weights would have made of the same choices.

Legend: T tokens, E experts, K the columns of a selection.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from typing_extensions import override

from moe_lightning.ops import Selection
from moe_lightning.routers.base import ChoiceHook, Router, Tokens


class Choices:
    """Expert ids, int32 (T, K), of each router of a model in each pass, routers in the order of the modules.

    Args:
        ids: of pass 0: those of each router; then of pass 1, and so on.

    Raises:
        ValueError: passes of differing numbers of routers, ids that are no (T, K) of integers, negative, or double in a
            row. Reads the device.
    """

    def __init__(self, ids: list[list[Tensor]] | None = None) -> None:
        self.passes = ids or []
        for number, layers in enumerate(self.passes):
            if len(layers) != len(self.passes[0]):
                raise ValueError(
                    f"replay: every pass must have all routers, got {len(layers)} in pass {number}, "
                    f"{len(self.passes[0])} in pass 0"
                )
            for layer, ids_TK in enumerate(layers):
                _check_ids(ids_TK, f"pass {number}, router {layer}")

    def tensors(self) -> dict[str, Tensor]:
        """By name, for `torch.save` or safetensors."""
        return {
            f"{number}.{layer}": ids_TK
            for number, layers in enumerate(self.passes)
            for layer, ids_TK in enumerate(layers)
        }

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Choices:
        """From `tensors`, in any order.

        Raises:
            ValueError: a name that is not "pass.router", one that is missing, or ids as of `Choices`.
        """
        passes: dict[int, dict[int, Tensor]] = {}
        for name, ids_TK in tensors.items():
            of_pass, dot, of_router = name.partition(".")
            if not (dot and of_pass.isdecimal() and of_router.isdecimal()):
                raise ValueError(f'replay: names must be "pass.router", two numbers, got {name!r}')
            passes.setdefault(int(of_pass), {})[int(of_router)] = ids_TK
        for number in range(len(passes)):
            layers: dict[int, Tensor] = passes.get(number, {})
            if sorted(layers) != list(range(len(layers))) or not layers:
                raise ValueError(
                    f"replay: passes and routers must be numbered from 0, got {sorted(layers)} in {number}"
                )
        return cls([[passes[n][layer] for layer in sorted(passes[n])] for n in sorted(passes)])

    def to(self, device: torch.device | str) -> Choices:
        """The same on a device."""
        moved = Choices()
        moved.passes = [[ids_TK.to(device) for ids_TK in layers] for layers in self.passes]
        return moved


def _check_ids(ids_TK: Tensor, where: str) -> None:
    if ids_TK.dim() != 2 or ids_TK.is_floating_point() or ids_TK.dtype == torch.bool:
        raise ValueError(
            f"replay: ids must be integers of shape (tokens, top_k), got {ids_TK.dtype} {tuple(ids_TK.shape)} in "
            f"{where}"
        )
    if ids_TK.numel() and int(ids_TK.min()) < 0:
        raise ValueError(f"replay: ids must not be negative, got {int(ids_TK.min())} in {where}")
    if bool((ids_TK.sort(dim=1).values.diff(dim=1) == 0).any()):
        raise ValueError(f"replay: a token's experts must differ, got one twice in {where}")


class _Recorder(ChoiceHook):
    def __init__(self, choices: Choices, layer: int, routers: int) -> None:
        self._choices, self._layer, self._routers = choices, layer, routers

    @override
    def select(self, router: Router, logits_TE: Tensor, tokens: Tokens) -> Selection:
        selection = router.select_experts(logits_TE, tokens)
        passes = self._choices.passes
        if not passes or len(passes[-1]) == self._routers:
            passes.append([])
        if len(passes[-1]) != self._layer:
            raise ValueError(
                f"replay: routers must be asked in the order of the modules, got router {self._layer} after "
                f"{len(passes[-1])} of {self._routers}; give a module whose forward asks each once"
            )
        passes[-1].append(selection.expert_ids_TK.detach().clone())
        return selection


class _Replayer(ChoiceHook):
    def __init__(self, ids: Iterator[Tensor], passes: int) -> None:
        self._ids, self._passes = ids, passes

    @override
    def select(self, router: Router, logits_TE: Tensor, tokens: Tokens) -> Selection:
        ids_TK = next(self._ids, None)
        if ids_TK is None:
            raise ValueError(f"replay: there must be choices for each pass, got a pass more than the {self._passes}")
        if ids_TK.shape != (logits_TE.shape[0], router.slots):
            raise ValueError(
                f"replay: choices must be of the pass's tokens, got ids of shape {tuple(ids_TK.shape)} for "
                f"{logits_TE.shape[0]} tokens, top_k={router.slots}; passes must have the batches that were recorded"
            )
        return router.select_given(logits_TE, ids_TK.to(logits_TE.device), tokens)


def _routers_of(module: nn.Module) -> list[Router]:
    routers = [part for part in module.modules() if isinstance(part, Router)]
    if not routers:
        raise ValueError(f"replay: there must be routers, got a {type(module).__name__} without")
    if any(router.choice_hook is not None for router in routers):
        raise ValueError("replay: a router must be recorded or replayed once at a time, got one that is already")
    return routers


@contextmanager
def _hooked(routers: list[Router], hooks: list[ChoiceHook]) -> Iterator[None]:
    try:
        for router, hook in zip(routers, hooks, strict=True):
            router.choice_hook = hook
        yield
    finally:
        for router in routers:
            router.choice_hook = None


@contextmanager
def record(module: nn.Module) -> Iterator[Choices]:
    """Keep the ids of each of the module's routers, pass by pass, before capacity limits and padding drop any.

    A pass that backward repeats (`recompute`) is not one. No CUDA graph meanwhile: training runs eagerly, and says so.

    Raises:
        ValueError: no router, or routers that are asked in another order than that of the modules.
    """
    routers, choices = _routers_of(module), Choices()
    with _hooked(routers, [_Recorder(choices, layer, len(routers)) for layer in range(len(routers))]):
        yield choices


@contextmanager
def replay(module: nn.Module, choices: Choices) -> Iterator[None]:
    """Give the module's routers these choices, a pass after the other; the logits make the weights, and get gradients.

    Capacity limits and padding drop what they drop. Biases that only choose are not updated by these passes.

    Raises:
        ValueError: choices of another number of routers, or of experts that there are not; a router whose weights do
            not follow from ids; in a pass, other tokens than were recorded, or a pass too many.
    """
    routers = _routers_of(module)
    for number, layers in enumerate(choices.passes):
        if len(layers) != len(routers):
            raise ValueError(
                f"replay: choices must be of as many routers as there are, got {len(layers)} for {len(routers)}"
            )
        for router, ids_TK in zip(routers, layers, strict=True):
            largest = int(ids_TK.max()) if ids_TK.numel() else 0
            if largest >= router.num_experts:
                raise ValueError(
                    f"replay: ids must be below num_experts={router.num_experts}, got {largest} in pass {number}"
                )
    of_routers = [[layers[number] for layers in choices.passes] for number in range(len(routers))]
    with _hooked(routers, [_Replayer(iter(ids), len(ids)) for ids in of_routers]):
        yield
