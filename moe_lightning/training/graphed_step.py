"""Forward and backward of a micro-batch as CUDA graphs: captured once, replayed for every batch of the same shape.

Nothing in a dropless MoE step reads the host, so its thousands of kernels can be started with one call. The graphs
share one memory pool: that of a gradient's first micro-batch writes the gradient, that of the others adds to it, and so
does that of timed micro-batches, in which the phases of routing and the exchanges are followed by events.

Where experts are spread over ranks, a replay and an eager micro-batch do the same with the other ranks' memory, in the
same order. So each rank decides for itself, and one may run eagerly what others replay.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.plugins import MixedPrecision, Precision
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn

from moe_lightning.callbacks.base import LayerCall, LayerWatch, MicroBatchTiming, moe_layers
from moe_lightning.callbacks.clocks import CapturedGroup, LayerClock, capture_events
from moe_lightning.layers.experts import adding_gradients
from moe_lightning.layers.phases import hook_parts
from moe_lightning.models import Decoder
from moe_lightning.training.strategy import ExpertParallelStrategy

CudaGraph = Literal["auto", "off"]
#: Of a micro-batch (B, S + 1): scalars, of which the first has the gradient.
Losses = dict[str, Tensor]

Kind = Literal["first", "next", "timed"]

#: How often something may change that the graphs hold, and they are captured again.
MOST_CHANGES = 5
#: Micro-batches that run eagerly before any is captured: libraries are loaded and kernels are compiled and chosen.
WARM_UP = 2
_SYNC = "synchronizing CUDA operation"


def total(losses: Losses) -> Tensor:
    """What the gradient is of."""
    loss, *auxiliary = losses.values()
    return loss + sum(auxiliary)


@dataclass
class _Graph:
    """A captured pass, and what it leaves in memory at each replay."""

    graph: torch.cuda.CUDAGraph
    losses: Losses
    calls: list[tuple[LayerWatch, list[LayerCall]]]
    events: list[CapturedGroup]


@dataclass
class _Memory:
    """What all graphs read and write."""

    batch: Tensor
    divisor: int
    weights: tuple[tuple[int, bool], ...]
    """Address of each, and whether it is trained."""
    settings: list[tuple[object, str, Any]]
    """Plain values that the captured step has read, or may have."""
    gradients: dict[nn.Parameter, Tensor] = field(default_factory=dict)
    graphs: dict[Kind, _Graph] = field(default_factory=dict)

    def bind(self, zero: bool = False) -> None:
        """Gradients are where the graphs write them, and zero if asked for."""
        for parameter, gradient in self.gradients.items():
            parameter.grad = gradient
        if zero:
            torch._foreach_zero_(list(self.gradients.values()))


class GraphedStep:
    """Runs forward and backward of micro-batches, by CUDA graphs where they can be captured.

    The results are those of the eager step to the bit. Hooks of callbacks between micro-batches run as ever; what they
    saw of the MoE layers while the step was captured is given to them again at each replay, with the new values in it.

    Args:
        module: whose step it is.
        compute: the losses of a micro-batch.
        callbacks: of the run.
    """

    def __init__(
        self, module: nn.Module, compute: Callable[[Tensor], Losses], callbacks: Sequence[L.Callback] = ()
    ) -> None:
        self._module, self._compute = module, compute
        self._watches = [callback for callback in callbacks if isinstance(callback, LayerWatch)]
        self._timings = [callback for callback in callbacks if isinstance(callback, MicroBatchTiming)]
        self._parameters, self._layers = list(module.parameters()), moe_layers(module)
        self._experts = [layer.experts for layer in self._layers]
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream()
        self._memory: _Memory | None = None
        self._batches = 0
        #: Shape and dtype of batches that have been run since what the graphs hold was last changed.
        self._prepared: set[tuple[torch.Size, torch.dtype]] = set()
        self._changes = 0
        #: Why there are no graphs, or no more.
        self.never: str | None = None
        self._said: set[str] = set()
        #: Whether backward of the batch at hand is done.
        self.backward_done = False

    def run(self, batch: Tensor, first: bool, divisor: int) -> Losses | None:
        """Losses of a micro-batch whose gradient has been computed, or None where it must run eagerly.

        Args:
            batch: token ids.
            first: whether a new gradient begins; else this one is added to it.
            divisor: of the loss, before backward.
        """
        self.backward_done = False
        self._batches += 1
        losses = self._run(batch, first, divisor)
        self._prepared.add((batch.shape, batch.dtype))
        return losses

    def _run(self, batch: Tensor, first: bool, divisor: int) -> Losses | None:
        if self._batches < WARM_UP:
            return None
        if reason := self._why_eager(batch):
            self._say(reason)
            return None
        if self._batches == WARM_UP:
            return self._run_watched(batch, first, divisor)
        memory = self._memory_for(batch, divisor)
        if memory is None or (not first and not memory.gradients):
            return None  # in the latter case the gradient was begun before there was a graph
        timed = any(timing.is_timing for timing in self._timings) and all(timing.is_idle for timing in self._timings)
        timed = timed and bool(memory.gradients)
        kind: Kind = "timed" if timed else "first" if first else "next"
        graph = memory.graphs.get(kind) or self._capture(memory, kind)
        if graph is None:
            return None
        memory.batch.copy_(batch, non_blocking=True)
        if first:
            self._drop_gradients()  # one that the graph does not give may have come from another rank
        memory.bind(zero=timed and first)
        graph.graph.replay()
        for watch, calls in graph.calls:
            watch.calls.extend(calls)
        for timer, key, events in graph.events:
            timer.close(key, events)
        self.backward_done = True
        return {name: value.clone() for name, value in graph.losses.items()}

    def zero_gradients(self) -> bool:
        """Whether the gradients are zero now, or need not be: they stay where the graphs write them."""
        if self.backward_done:
            return True
        if self._memory is None or not self._memory.gradients:
            return False
        self._drop_gradients()
        self._memory.bind(zero=True)
        return True

    def _drop_gradients(self) -> None:
        for parameter in self._parameters:
            parameter.grad = None

    # ---- eagerly -----------------------------------------------------------------------------------------
    def _why_eager(self, batch: Tensor) -> str | None:
        """What of this micro-batch cannot be captured or replayed."""
        if self.never:
            return self.never
        memory = self._memory
        if memory is not None and (batch.shape, batch.dtype) != (memory.batch.shape, memory.batch.dtype):
            return f"a batch of shape {tuple(batch.shape)}; the graph is of {tuple(memory.batch.shape)}"
        for layer in self._layers:
            if layer.router.choice_hook is not None:
                return "the choices of experts are recorded or replayed"
            if others := [hook for hook in hook_parts(layer.hook) if not isinstance(hook, LayerClock)]:
                return f"{type(others[0]).__name__} follows the phases of this micro-batch"
        return None

    def _say(self, reason: str) -> None:
        """Once each."""
        if reason not in self._said:
            self._said.add(reason)
            rank_zero_info(f"cuda_graph: eager, {reason}")

    def _run_watched(self, batch: Tensor, first: bool, divisor: int) -> Losses:
        """Eagerly, to find what waits for the device, and what must not be in a graph."""
        if first:
            self._module.zero_grad()
        before = _collectives()
        with _synchronizations() as found:
            losses = self._forward_backward(batch, divisor, adds=not first)
        if found:
            self.never = f"the step reads the host: {found[0]}"
        elif _collectives() != before:
            self.never = "the step has a collective, such as of balance_scope=global, which a graph must not hold"
        self.backward_done = True
        return losses

    def _forward_backward(self, batch: Tensor, divisor: int, adds: bool) -> Losses:
        with adding_gradients(self._experts, adds):
            losses = self._compute(batch)
            with torch.autocast("cuda", enabled=False):  # Lightning's is of the forward pass alone
                (total(losses) / divisor).backward()
        return {name: value.detach() for name, value in losses.items()}

    # ---- graphs ------------------------------------------------------------------------------------------
    def _memory_for(self, batch: Tensor, divisor: int) -> _Memory | None:
        """That of the graphs; None where this micro-batch must run eagerly first.

        So it must where something has changed that they hold, or the batch is of a shape that was not run since: it may
        load libraries, and make buffers, which cannot be while a graph is captured.
        """
        weights = tuple((p.data_ptr(), p.requires_grad) for p in self._parameters)
        memory = self._memory
        if memory is not None:
            changed = next(
                (f"{type(m).__name__}.{k}" for m, k, value in memory.settings if getattr(m, k) != value), None
            )
            if changed is None and (memory.weights, memory.divisor) == (weights, divisor):
                return memory
            self._drop_graphs()
            self._changes += 1
            if self._changes > MOST_CHANGES:
                self.never = f"{changed or 'a weight or the accumulation'} keeps changing"
            return None
        if (batch.shape, batch.dtype) not in self._prepared:
            return None
        self._memory = _Memory(torch.empty_like(batch), divisor, weights, _settings(self._module))
        return self._memory

    def _capture(self, memory: _Memory, kind: Kind) -> _Graph | None:
        """None where the step does something that cannot be captured."""
        for parameter in self._parameters:
            parameter.grad = None if kind == "first" else memory.gradients.get(parameter)
        for watch in self._watches:
            watch.calls.clear()
        graph = torch.cuda.CUDAGraph()
        try:
            with ExitStack() as stack:
                for timing in self._timings:
                    stack.enter_context(timing.timing(kind == "timed"))
                events = stack.enter_context(capture_events())
                # Other threads, that load data or watch collectives, may go on.
                capture = torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local")
                stack.enter_context(capture)
                losses = self._forward_backward(memory.batch, memory.divisor, adds=kind != "first")
        except (torch.AcceleratorError, torch.OutOfMemoryError) as error:  # nothing of it was run
            self.never = f"the step cannot be captured: {str(error).splitlines()[0]}"
            self._say(self.never)
            for watch in self._watches:
                watch.calls.clear()
            self._drop_graphs()  # an eager step may need their memory
            return None
        calls = [(watch, list(watch.calls)) for watch in self._watches]
        for watch in self._watches:
            watch.calls.clear()
        if kind == "first":
            memory.gradients = {p: p.grad for p in self._parameters if p.grad is not None}
        memory.graphs[kind] = _Graph(graph, losses, calls, events)
        return memory.graphs[kind]

    def _drop_graphs(self) -> None:
        """A gradient that has been begun stays with its weights."""
        if self._memory is not None:
            torch.cuda.synchronize()
            self._memory = None
            self._pool = torch.cuda.graph_pool_handle()  # one whose graphs are gone cannot be used again
            self._prepared.clear()

    def close(self) -> None:
        """Give the memory back, that of the gradients too."""
        gradients = {} if self._memory is None else self._memory.gradients
        self._drop_graphs()
        for parameter, gradient in gradients.items():
            if parameter.grad is gradient:
                parameter.grad = None


def why_never(trainer: L.Trainer, module: L.LightningModule) -> str | None:
    """Why no step of this run can be a CUDA graph; None where it can."""
    strategy: Any = trainer.strategy
    precision: Precision = strategy.precision_plugin
    if strategy.root_device.type != "cuda":
        return f"the device is {strategy.root_device.type}"
    spread = isinstance(strategy, ExpertParallelStrategy) and strategy.reduces_gradients
    if not spread and not isinstance(strategy, SingleDeviceStrategy):
        return f"{type(strategy).__name__} reduces gradients in backward; one device or ddp_ep_symmetric do not"
    if isinstance(precision, MixedPrecision) and precision.scaler is not None:
        return "16-mixed scales gradients by what the host reads; bf16-mixed does not"
    if trainer._detect_anomaly:
        return "detect_anomaly reads every value"
    for name, part in module.named_modules():
        if isinstance(part, Decoder) and part.config.recompute == "block" and part.config.dropout:
            return "dropout with recompute=block draws again from a state that the host sets; recompute=moe does not"
        if hooks := [hook for hook in part._forward_hooks.values() if not _of_watch(hook)]:
            return f"{name or type(module).__name__} has a forward hook, {getattr(hooks[0], '__name__', hooks[0])}"
        if part._forward_pre_hooks or part._backward_hooks or part._backward_pre_hooks:
            return f"{name or type(module).__name__} has a hook"
    for name, parameter in module.named_parameters():
        if has_gradient_hook(parameter):
            return f"{name} has a hook on its gradient"
    return None


def has_gradient_hook(parameter: Tensor) -> bool:
    """Whether something of its own is called when its gradient comes."""
    return bool(parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None))


def _settings(module: nn.Module) -> list[tuple[object, str, Any]]:
    """Plain public values of all modules and dispatchers: a captured step has them in its kernels, and they may change.

    By a callback, or since a dispatcher's buffers had to grow.
    """
    return [
        (part, name, value)
        for part in (*module.modules(), *(layer.dispatcher for layer in moe_layers(module)))
        for name, value in vars(part).items()
        if isinstance(value, (bool, int, float, str)) and not name.startswith("_")
    ]


def _of_watch(hook: Any) -> bool:
    return isinstance(getattr(getattr(hook, "func", None), "__self__", None), LayerWatch)


def _collectives() -> int:
    """How many all ranks have begun. NCCL cannot abort while a graph holds one: a rank that fails would hang."""
    if not (dist.is_available() and dist.is_initialized()):
        return 0
    assert dist.group.WORLD is not None
    return dist.group.WORLD._get_sequence_number_for_group()  # type: ignore[attr-defined]


@contextmanager
def _synchronizations() -> Iterator[list[str]]:
    """Where the host waits for the device meanwhile: file and line of each."""
    found: list[str] = []
    mode = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode(mode)
    for warning in caught:
        if _SYNC in str(warning.message):
            found.append(f"{warning.filename}:{warning.lineno}")
        elif not str(warning.message).startswith("Synchronization debug mode is a prototype"):
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
