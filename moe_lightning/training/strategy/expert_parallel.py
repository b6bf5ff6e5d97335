"""Data parallelism for dense parameters, expert parallelism for experts, as one Lightning strategy.

Legend: W ranks, P = ep_size ranks that hold the experts between them; there are W / P such groups of neighbours.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from inspect import signature
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.overrides.distributed import _sync_module_states
from lightning.pytorch.strategies import DDPStrategy, StrategyRegistry
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.distributed.distributed_c10d import _set_pg_timeout
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from typing_extensions import override

from moe_lightning.callbacks.base import moe_layers
from moe_lightning.expert_parallel.expert_shards import ExpertShards, make_rank_groups
from moe_lightning.expert_parallel.factory import DISPATCHES, DispatcherFactory
from moe_lightning.layers import MoE
from moe_lightning.layers.dispatch import Dispatcher
from moe_lightning.models import Decoder
from moe_lightning.training.optimizer import clip_to_norm
from moe_lightning.training.strategy.average_gradients import average_gradients
from moe_lightning.training.strategy.watched_ddp import WatchedDDPStrategy
from moe_lightning.utils.checks import check_choice, check_sizes
from moe_lightning.utils.errors import ContextLostError


class ExpertParallelStrategy(WatchedDDPStrategy):
    """DDP whose experts are spread over groups of `ep_size` ranks; rows travel to them (GShard, arXiv:2006.16668).

    A run equals one on a single rank with all the tokens: initial weights, losses, gradients, clipping. Checkpoints
    hold whole tensors, so they load on any number of ranks. Prediction gathers the experts, since ranks may get
    unequal numbers of prompts.

    Experts' gradients become their mean once backward of the last micro-batch is done, after `on_after_backward` of
    callbacks. So do all others under dispatch=symmetric, without DistributedDataParallel, which reduces them within
    backward, where a CUDA graph cannot: parameters may be unused on some ranks or all, and buffers are each rank's own
    after the start.

    Args:
        ep_size: P, divides the number of ranks; None: all of them.
        check_counts: compare the splits of every all-to-all with the other ranks' first; slow, to find a fault.
        dispatch: how rows travel: "nccl" on GPUs or "gloo" on CPUs, which is the default, by all-to-alls that overlap
            with the experts; "symmetric", straight into the memory of the other ranks, which must be of the same host,
            without any waiting on the host.
        max_tokens: of a rank in a pass, for which "symmetric" has capacity. None: as many as in the first pass,
            and more where all ranks have as many.
        kwargs: of `WatchedDDPStrategy`: the time-outs; and of `DDPStrategy`, but none of DistributedDataParallel under
            "symmetric".
    """

    strategy_name = "ddp_ep"

    def __init__(
        self,
        ep_size: int | None = None,
        check_counts: bool = False,
        dispatch: str | None = None,
        max_tokens: int | None = None,
        **kwargs: Any,
    ) -> None:
        if ep_size is not None and ep_size < 1:
            raise ValueError(f"strategy: ep_size must be at least 1, got ep_size={ep_size}")
        if dispatch is not None:
            check_choice("strategy", "dispatch", dispatch, DISPATCHES)
        if max_tokens is not None:
            check_sizes("strategy", max_tokens=max_tokens)
            if dispatch != "symmetric":
                raise ValueError(
                    f"strategy: max_tokens is of dispatch=symmetric, got dispatch={dispatch}; leave it out"
                )
        if check_counts and dispatch == "symmetric":
            raise ValueError(
                "strategy: check_counts is of exchanges, got dispatch=symmetric, whose kernels always check; leave one "
                "of them out"
            )
        super().__init__(**kwargs)
        if dispatch == "symmetric":
            _check_no_ddp(self)
        self.ep_size = ep_size
        self.check_counts = check_counts
        self.dispatch, self.max_tokens = dispatch, max_tokens
        self._module: nn.Module | None = None  # whose experts are spread
        self._shards: ExpertShards | None = None
        self._local: list[tuple[MoE, Dispatcher]] = []  # each layer's own dispatcher
        self._factory: DispatcherFactory | None = None  # of the ranks that share the experts
        self._replica_group: Any = None  # ranks that hold the same experts; None: no others do

    # ---- set-up ------------------------------------------------------------------------------------------
    @override
    def setup_environment(self) -> None:
        """As in DDP; callbacks that cannot work are refused before any data is read."""
        assert self.lightning_module is not None
        _check_callbacks(self.lightning_module.trainer, self.lightning_module)
        super().setup_environment()

    @override
    def setup(self, trainer: L.Trainer) -> None:
        """Shard the experts before anything is wrapped, moved or optimised; gather them for prediction."""
        assert self.lightning_module is not None
        if self._module is not self.lightning_module:
            self._forget()
        if trainer.state.fn == TrainerFn.PREDICTING:
            self._gather_experts()
        else:
            if trainer.state.fn == TrainerFn.FITTING:
                _check_recompute(self.lightning_module)
            self._spread_experts(self.lightning_module)
        super().setup(trainer)
        if trainer.state.fn == TrainerFn.FITTING and self._shards is not None:
            self.precision_plugin.clip_grad_by_norm = self._clip_grad_by_norm  # type: ignore[method-assign]
            if getattr(self.precision_plugin, "scaler", None) is not None:
                # An infinity in one rank's experts must lower the loss scale of all.
                scaler = ShardedGradScaler(self.root_device.type, process_group=dist.group.WORLD)
                self.precision_plugin.scaler = scaler  # type: ignore[attr-defined]

    def _spread_experts(self, module: nn.Module) -> None:
        if self._shards is not None:
            return
        layers = moe_layers(module)
        if not layers:
            return
        if self._factory is None:
            group, self._replica_group = make_rank_groups(self.ep_size, self._start_timeout)
            self._factory = DispatcherFactory(
                group, self.root_device, self.dispatch, self.max_tokens, self.check_counts, self._start_timeout
            )
        dispatchers = [self._factory.make(layer) for layer in layers]  # raise before anything is changed
        self._module = module
        self._shards = ExpertShards(module, self._factory.group, self.root_device)
        self._check_same_init()
        self._shards.shard_()
        for layer, dispatcher in zip(layers, dispatchers, strict=True):
            self._local.append((layer, layer.dispatcher))
            layer.dispatcher = dispatcher
        # Neither DDP may reduce their gradients, nor may rank zero's be sent to all.
        names = list(self._shards.parameters)
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, names)

    @override
    def configure_ddp(self) -> None:
        if self.reduces_gradients:
            assert self.model is not None
            _sync_module_states(self.model)  # of rank zero, as DDP does when it is made
        else:
            super().configure_ddp()

    def _check_same_init(self) -> None:
        """No rank's experts are sent to another: all must have drawn the same."""
        assert self._shards is not None
        sums = [parameter.detach().double().sum() for parameter in self._shards.parameters.values()]
        most = torch.stack([*sums, *(-total for total in sums)]).to(self.root_device)
        dist.all_reduce(most, dist.ReduceOp.MAX)
        if (most[: len(sums)] + most[len(sums) :]).ne(0).any():  # the most of x and of -x cancel if all are equal
            raise ValueError("strategy: every rank must start from the same weights, got others; set seed_everything")

    def _gather_experts(self) -> None:
        if self._shards is None:
            return
        self._shards.unshard_()
        for layer, dispatcher in self._local:
            layer.dispatcher = dispatcher
        self._forget()

    def _forget(self) -> None:
        """Nothing is spread any more, or it is of a model that is no longer this strategy's."""
        self._module, self._shards, self._local = None, None, []
        self.precision_plugin.__dict__.pop("clip_grad_by_norm", None)

    # ---- micro-batches -----------------------------------------------------------------------------------
    @override
    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """A micro-batch; under automatic optimization none of its passes is kept for a later one.

        Raises:
            ContextLostError: a kernel of an earlier one has ended this process's CUDA context.
        """
        assert self.lightning_module is not None
        if self._factory is None or not self.lightning_module.automatic_optimization:
            return super().training_step(*args, **kwargs)
        if error := self._factory.error():
            raise ContextLostError(error)
        with self._factory.micro_batch():
            return super().training_step(*args, **kwargs)

    # ---- gradients ---------------------------------------------------------------------------------------
    @property
    def reduces_gradients(self) -> bool:
        """Whether all gradients are reduced here, after backward, and none by DDP within it."""
        return self.dispatch == "symmetric"

    @override
    def pre_backward(self, closure_loss: Tensor) -> None:
        """Under manual optimization a gradient may hold the mean of an earlier backward, to be divided once more."""
        super().pre_backward(closure_loss)
        module = self.lightning_module
        if self._shards is None or module is None or module.automatic_optimization:
            return
        if gradients := [p.grad for p in self._shards.parameters.values() if p.grad is not None]:
            torch._foreach_mul_(gradients, self._shards.world)

    @override
    def post_backward(self, closure_loss: Tensor) -> None:
        """Gradients become their mean over the ranks, once an optimizer step; those of dense parameters, unless by DDP.

        The sum over the tokens of all P ranks has come to an expert; it is divided by W, and added up over the ranks
        that hold the same expert.
        """
        super().post_backward(closure_loss)
        module = self.lightning_module
        if module is None or module.trainer.fit_loop._should_accumulate():
            return
        trained = [p for p in module.parameters() if p.requires_grad]
        experts = [p for p in trained if self._shards is not None and p in self._shards]
        if self.reduces_gradients:
            dense = [p for p in trained if self._shards is None or p not in self._shards]
            average_gradients(dense, self.world_size, dist.group.WORLD)
        average_gradients(experts, self.world_size, self._replica_group)

    def _clip_grad_by_norm(self, optimizer: Optimizer, clip_val: int | float) -> None:
        """By the norm over all parameters of all ranks, each counted once."""
        parameters = list(self.precision_plugin.main_params(optimizer))
        assert self._shards is not None
        experts: list[Tensor] = []
        dense: list[Tensor] = []
        for parameter in parameters:
            if parameter.grad is not None:
                (experts if parameter in self._shards else dense).append(parameter.grad)
        own = _square_norm(experts).to(self.root_device)
        squares = [torch.empty_like(own) for _ in range(self._shards.world)]
        dist.all_gather(squares, own, group=self._shards.group)  # added in one order in every group
        norm = (_square_norm(dense).to(self.root_device) + torch.stack(squares).sum()).sqrt()
        clip_to_norm(optimizer, norm, float(clip_val))

    @override
    def reduce(self, tensor: Tensor, group: Any | None = None, reduce_op: Any = "mean") -> Tensor:
        """As in DDP, of the metrics that are logged with sync_dist."""
        try:
            return super().reduce(tensor, group, reduce_op)
        except RuntimeError as error:
            error.add_note(
                "strategy: every rank must log the same metrics where sync_dist=True, got an error while one was "
                "reduced; log it on all ranks, or without sync_dist"
            )
            raise

    # ---- ends --------------------------------------------------------------------------------------------
    @override
    def _set_timeout(self, timeout: timedelta) -> None:
        super()._set_timeout(timeout)
        if self._factory is not None:
            self._factory.set_timeout(timeout)
        if self._replica_group is not None:
            _set_pg_timeout(timeout, self._replica_group)

    @override
    def on_exception(self, exception: BaseException) -> None:
        """As without experts, and add a kernel's error."""
        if self._factory is not None and (error := self._factory.error()):
            exception.add_note(error)
        super().on_exception(exception)

    @override
    def _context_is_lost(self) -> bool:
        return self._factory is not None and self._factory.error() is not None

    # ---- checkpoints -------------------------------------------------------------------------------------
    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Whole tensors. A collective, as Lightning asks every rank."""
        state = super().lightning_module_state_dict()
        return state if self._shards is None else self._shards.gather_model_state(state, self.is_global_zero)

    @override
    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The same for what the optimizer keeps."""
        state = super().optimizer_state(optimizer)
        if self._shards is None:
            return state
        return self._shards.gather_optimizer_state(optimizer, state, self.is_global_zero)

    @override
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Of whole tensors, this rank's share where the experts are spread already."""
        if self._shards is not None:
            checkpoint = {**checkpoint, "state_dict": self._shards.shard_model_state(checkpoint["state_dict"])}
        super().load_model_state_dict(checkpoint, strict)

    @override
    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """As `load_model_state_dict`."""
        if self._shards is not None:
            states = zip(self.optimizers, checkpoint["optimizer_states"], strict=True)
            shares = [self._shards.shard_optimizer_state(optimizer, state) for optimizer, state in states]
            checkpoint = {**checkpoint, "optimizer_states": shares}
        super().load_optimizer_state_dict(checkpoint)

    @classmethod
    @override
    def register_strategies(cls, strategy_registry: Any) -> None:
        """`ddp_ep`, and `ddp_ep_symmetric`, whose rows are written straight into the other ranks' memory."""
        description = "DDP with experts spread over the ranks"
        strategy_registry.register(cls.strategy_name, cls, description=description)
        strategy_registry.register(
            f"{cls.strategy_name}_symmetric", cls, description=f"{description} of one host", dispatch="symmetric"
        )


def _check_no_ddp(strategy: DDPStrategy) -> None:
    defaults = {name: p.default for name, p in signature(DistributedDataParallel).parameters.items()}
    given = {name: value for name, value in strategy._ddp_kwargs.items() if value != defaults.get(name)}
    for name in ("ddp_comm_state", "ddp_comm_hook", "ddp_comm_wrapper", "model_averaging_period"):
        if (value := getattr(strategy, f"_{name}")) is not None:
            given[name] = value
    if given:
        raise ValueError(
            "strategy: dispatch=symmetric does without DistributedDataParallel, and parameters may be unused, got "
            f"{', '.join(f'{name}={value}' for name, value in given.items())}; leave it out"
        )


def _check_callbacks(trainer: L.Trainer, module: nn.Module) -> None:
    if any(getattr(callback, "save_on_exception", False) for callback in trainer.checkpoint_callbacks):
        raise ValueError(
            "strategy: under ddp_ep a checkpoint takes every rank, so none can be saved when one fails, got "
            "checkpoint.save_on_exception=true; leave it out"
        )
    kinds = (WeightAveraging, StochasticWeightAveraging)
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    averaging = [type(callback).__name__ for callback in callbacks if isinstance(callback, kinds)]
    if averaging and trainer.state.fn == TrainerFn.FITTING and moe_layers(module):
        raise ValueError(
            "strategy: under ddp_ep a rank has a share of the experts, which weight averaging cannot take, got "
            f"{', '.join(averaging)}; leave it out, or train with --trainer.strategy ddp"
        )


def _check_recompute(module: nn.Module) -> None:
    layers = moe_layers(module)
    asked = ["moe" for layer in layers if layer.recompute]
    asked += ["block" for part in module.modules() if isinstance(part, Decoder) and part.config.recompute == "block"]
    if layers and asked:
        raise ValueError(
            "strategy: under ddp_ep rows travel to other ranks once per pass, and backward must not send them again, "
            f"got recompute={asked[0]}; set --model.recompute none, or train with --trainer.strategy ddp"
        )


def _square_norm(gradients: list[Tensor]) -> Tensor:
    return torch.nn.utils.get_total_norm(gradients).square()


if "ddp_ep" not in StrategyRegistry:
    ExpertParallelStrategy.register_strategies(StrategyRegistry)
