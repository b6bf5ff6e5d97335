"""An optimizer step: its micro-batches, which `fit` and benchmarks share, and all of it without a trainer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Literal, get_args

import lightning as L
import torch
from lightning.pytorch.plugins import MixedPrecision, Precision
from lightning.pytorch.strategies import SingleDeviceStrategy, Strategy
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from moe_lightning.callbacks.base import moe_layers
from moe_lightning.layers.experts import adding_gradients
from moe_lightning.layers.low_precision import LowPrecisionWeights
from moe_lightning.training.graphed_step import GraphedStep, Losses, has_gradient_hook, total
from moe_lightning.training.optimizer import clip_by_norm
from moe_lightning.utils.checks import check_choice, check_positive

#: As `--trainer.precision`; the scaler of 16-mixed reads the host, and is the trainer's.
StepPrecision = Literal["bf16-mixed", "32-true"]


class MicroBatches:
    """Runs the micro-batches of gradients: as CUDA graphs where they can be, weights cast once per gradient.

    Args:
        module: whose gradient it is.
        compute: the losses of a micro-batch.
        network: whose weights are cast to the dtype of products.
        copies: that dtype, where autocast would cast weights more than once per gradient; None: no copies.
        adds_gradients: whether experts may add gradients to those of earlier micro-batches unseen by autograd.
        cuda_graph: whether to try graphs, see `GraphedStep`.
        callbacks: of the run.
    """

    def __init__(
        self,
        module: nn.Module,
        compute: Callable[[Tensor], Losses],
        network: nn.Module,
        copies: torch.dtype | None = None,
        adds_gradients: bool = False,
        cuda_graph: bool = False,
        callbacks: Sequence[L.Callback] = (),
    ) -> None:
        self._compute = compute
        self._experts = [layer.experts for layer in moe_layers(module)] if adds_gradients else []
        self._first = True
        self._copies = None if copies is None else LowPrecisionWeights(network, copies)
        #: None: all is eager.
        self.graphs = GraphedStep(module, compute, callbacks) if cuda_graph else None

    def run(self, batch: Tensor, first: bool, divisor: int) -> Losses:
        """Losses of a micro-batch; `backward_done` says whether its gradient is there too.

        Args:
            batch: token ids.
            first: whether a new gradient begins; else this one is added to it.
            divisor: of the loss, before backward.
        """
        self._first = first
        if self._copies is not None and first:
            self._copies.refresh()
        with self._product_weights():
            losses = None if self.graphs is None else self.graphs.run(batch, first, divisor)
        if losses is not None:
            return losses
        with self.eager_pass():
            return self._compute(batch)

    @contextmanager
    def eager_pass(self) -> Iterator[None]:
        """How layers compute meanwhile: for backward too, where a pass may be repeated."""
        with self._product_weights(), adding_gradients(self._experts, not self._first):
            yield

    def _product_weights(self) -> AbstractContextManager[None]:
        """Products read the weights' copies meanwhile."""
        return nullcontext() if self._copies is None else self._copies.used()

    @property
    def backward_done(self) -> bool:
        """Of the micro-batch at hand."""
        return self.graphs is not None and self.graphs.backward_done

    def zero_gradients(self) -> bool:
        """Whether the gradients are zero now, or need not be, where there are graphs."""
        return self.graphs is not None and self.graphs.zero_gradients()

    def close(self) -> None:
        """Give the memory of graphs back."""
        if self.graphs is not None:
            self.graphs.close()


def copies_dtype(precision: Precision, accumulate: int) -> torch.dtype | None:
    """In what dtype weights are copied: where autocast would cast them more than once per gradient."""
    if not isinstance(precision, MixedPrecision) or accumulate == 1:
        return None
    return torch.bfloat16 if precision.precision == "bf16-mixed" else torch.float16


def adds_gradients(strategy: Strategy, module: nn.Module) -> bool:
    """Whether nothing follows the gradients of the experts' weights on their way: no reducer, no hook."""
    if not isinstance(strategy, SingleDeviceStrategy):
        return False
    weights = [weight for layer in moe_layers(module) for weight in layer.experts.parameters()]
    return not any(has_gradient_hook(weight) for weight in weights)


class OptimizerStep:
    """The work of an optimizer step of `fit`, in its order and to the bit, without the loops and hooks around it.

    Args:
        module: a `LanguageModule`, in training mode, on its device.
        optimizer: of its parameters.
        precision: bf16-mixed or 32-true.
        accumulate: micro-batches in a gradient.
        clip_norm: the largest norm of the gradient; None: it is not clipped.
        cuda_graph: forward and backward of a micro-batch are CUDA graphs where they can be, see `GraphedStep`.
        schedule: stepped after the optimizer; None: the learning rate stays.

    Raises:
        ValueError: an argument is out of its range, or CUDA graphs of a module that is not on a GPU.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        precision: StepPrecision,
        accumulate: int = 1,
        clip_norm: float | None = 1.0,
        cuda_graph: bool = False,
        schedule: LRScheduler | None = None,
    ) -> None:
        device = next(module.parameters()).device
        check_choice("optimizer_step", "precision", precision, get_args(StepPrecision))
        if clip_norm is not None:
            check_positive("optimizer_step", "clip_norm", clip_norm)
        if cuda_graph and device.type != "cuda":
            raise ValueError(
                f"optimizer_step: cuda_graph must be False without a GPU, got cuda_graph={cuda_graph}, "
                f"device={device.type}; move the module to a GPU or leave it out"
            )
        self._optimizer, self._schedule, self._clip_norm = optimizer, schedule, clip_norm
        self.accumulate = accumulate
        mixed = precision == "bf16-mixed"
        self._precision: Precision = MixedPrecision("bf16-mixed", device.type) if mixed else Precision()
        copies = copies_dtype(self._precision, accumulate)
        self.micro_batches = MicroBatches(module, module.losses, module.network, copies, True, cuda_graph)  # type: ignore[arg-type]

    def __call__(self, batches: Sequence[Tensor]) -> list[Losses]:
        """`gradient`, then `update`."""
        losses = self.gradient(batches)
        self.update()
        return losses

    def gradient(self, batches: Sequence[Tensor]) -> list[Losses]:
        """The mean over `accumulate` micro-batches, each int64 (B, S + 1); their losses."""
        losses = []
        for i, batch in enumerate(batches):
            losses.append(self.forward(batch, i == 0))
            if i == 0 and not self.micro_batches.zero_gradients():
                self._optimizer.zero_grad()
            if not self.micro_batches.backward_done:
                with self.micro_batches.eager_pass():
                    (total(losses[-1]) / self.accumulate).backward()
        return [{name: value.detach() for name, value in of_batch.items()} for of_batch in losses]

    def forward(self, batch: Tensor, first: bool) -> Losses:
        """Losses of a micro-batch; in graphs with their gradient."""
        with self._precision.forward_context():
            return self.micro_batches.run(batch, first, self.accumulate)

    def update(self) -> None:
        """Clip the gradient and change the weights."""
        if self._clip_norm is not None:
            clip_by_norm(self._optimizer, self._clip_norm)
        self._optimizer.step()
        if self._schedule is not None:
            self._schedule.step()

    def close(self) -> None:
        """Give the memory of graphs and gradients back."""
        self.micro_batches.close()
        self._optimizer.zero_grad()
