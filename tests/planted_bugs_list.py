"""Bugs for `plant_bugs.py`: faults that tests once let through, and their neighbours."""

from typing import NamedTuple


class Bug(NamedTuple):
    """`old` stands once in `file`; with `new` in its place, one of `tests` must fail."""

    file: str
    old: str
    new: str
    tests: str


_LOSSES = "tests/training/test_auxiliary_losses.py tests/training/test_language_module.py"
_OPTIMIZER = "tests/training/test_optimizer.py"
_EP = "tests/bench/test_ep_commands.py -k by_hand"
_LOAD = "tests/metrics tests/callbacks/test_expert_load_monitor.py"
_EXCHANGE = "tests/callbacks/test_exchange_timing.py tests/expert_parallel/test_collectives.py"
_MODULES = "moe_lightning/training/modules.py"
_MODULE = "moe_lightning/training/language_module.py"
_SCHEDULE = "moe_lightning/training/optimizer.py"
_CROSS_ENTROPY = "moe_lightning/training/cross_entropy.py"
_MEASURE = "moe_lightning/bench/ep/measure.py"
_STEP, _OF_STEP = "moe_lightning/training/optimizer_step.py", "tests/training/test_optimizer_step.py"
_AVERAGE, _OF_AVERAGE = (
    "moe_lightning/training/strategy/average_gradients.py",
    "tests/training/test_average_gradients.py",
)
_EP_STRATEGY = "moe_lightning/training/strategy/expert_parallel.py"
_POOL, _OF_POOL = "moe_lightning/expert_parallel/symmetric.py", "tests/expert_parallel/test_symmetric_ranks.py"
_THROUGHPUT = "moe_lightning/callbacks/throughput.py"

BUGS = [
    # ---- losses ------------------------------------------------------------------------------------------
    Bug(_MODULES, "self.balance_coef * balance_L.mean()", "self.balance_coef * balance_L.sum()", _LOSSES),
    Bug(_MODULES, 'losses["z_loss"] = ', "_ = ", _LOSSES),
    Bug(_MODULES, "for r in output.routings]).mean()", "for r in output.routings]).sum()", _LOSSES),
    Bug("moe_lightning/training/graphed_step.py", "return loss + sum(auxiliary)", "return loss", _LOSSES),
    Bug(_MODULE, "for of_batch in self._accumulated]).mean()", "for of_batch in self._accumulated]).sum()", _LOSSES),
    Bug(_MODULE, "torch._foreach_mul_(gradients, full / there)", "pass", _LOSSES),
    Bug(_MODULE, 'reduction="none")[1])', 'reduction="mean")[1])', _LOSSES),
    Bug(
        "moe_lightning/routers/losses.py",
        "load_E.sum().clamp(min=1)",
        "logits_TE.shape[0]",
        "tests/routers/test_router_losses.py",
    ),
    Bug(
        "moe_lightning/routers/losses.py",
        ".square().sum() / max",
        ".sum() / max",
        "tests/routers/test_router_losses.py",
    ),
    # ---- optimizer ---------------------------------------------------------------------------------------
    Bug(_SCHEDULE, '"weight_decay": weight_decay}', '"weight_decay": 0.0}', _OPTIMIZER),
    Bug(_SCHEDULE, '"weight_decay": 0.0}', '"weight_decay": weight_decay}', _OPTIMIZER),
    Bug(_SCHEDULE, "betas = (config.beta1, config.beta2)", "betas = (config.beta2, config.beta1)", _OPTIMIZER),
    Bug(
        _SCHEDULE,
        "return (step + 1) / self._config.warmup_steps",
        "return step / self._config.warmup_steps",
        _OPTIMIZER,
    ),
    Bug(_SCHEDULE, "* 0.5 * (1 + math.cos(math.pi * progress))", "* (1 - progress)", _OPTIMIZER),
    Bug(_SCHEDULE, "return 1 - (1 - config.min_lr_ratio) * progress", "return 1 - progress", _OPTIMIZER),
    # ---- throughput and times ----------------------------------------------------------------------------
    Bug(_THROUGHPUT, "rate * trainer.world_size", "rate", "tests/callbacks/test_throughput.py"),
    Bug(_THROUGHPUT, "rate * 3 * self._network", "rate * 2 * self._network", "tests/callbacks/test_throughput.py"),
    Bug(
        "moe_lightning/callbacks/router_timing.py",
        "for phase in phases) / passes",
        "for phase in phases)",
        "tests/callbacks/test_router_timing.py",
    ),
    Bug("moe_lightning/callbacks/router_timing.py", "value + self.backward.get(name, 0.0)", "value", "tests/callbacks"),
    # ---- load --------------------------------------------------------------------------------------------
    Bug("moe_lightning/metrics/expert_load.py", "correction=0", "correction=1", _LOAD),
    Bug("moe_lightning/metrics/expert_load.py", "1 - load_LE.sum(1) / slots_L", "load_LE.sum(1) / slots_L", _LOAD),
    Bug("moe_lightning/metrics/expert_load.py", "(counts_LE == 0)", "(counts_LE <= 1)", _LOAD),
    # ---- exchanges ---------------------------------------------------------------------------------------
    Bug(
        "moe_lightning/expert_parallel/collectives.py",
        "self.bytes_received = received.nbytes",
        "self.bytes_received = rows.nbytes",
        _EXCHANGE,
    ),
    Bug(
        "moe_lightning/callbacks/exchange_timing.py",
        "self.megabytes / self.total_ms",
        "self.total_ms / self.megabytes",
        _EXCHANGE,
    ),
    Bug("moe_lightning/callbacks/exchange_timing.py", "(self.batch, key), events", "(0, key), events", _EXCHANGE),
    # ---- ranks -------------------------------------------------------------------------------------------
    Bug(_AVERAGE, "there[i] = 0", "there[i] = 1", _OF_AVERAGE),
    Bug(_AVERAGE, "_foreach_mul_(gradients, 1 / ranks)", "_foreach_mul_(gradients, 1)", _OF_AVERAGE),
    Bug(_EP_STRATEGY, "_foreach_mul_(gradients, self._shards.world)", "_foreach_mul_(gradients, 1)", _OF_AVERAGE),
    Bug(_EP_STRATEGY, "or module.trainer.fit_loop._should_accumulate()", "", _OF_AVERAGE),
    Bug(_POOL, "held.micro_batch == self._memory.micro_batches and ", "", _OF_POOL),
    Bug(_POOL, " and (self._memory.is_capturing() or not held.captured)", "", _OF_POOL),
    Bug(_POOL, "memory.in_micro_batch or (memory.micro_batches > 0", "(memory.micro_batches > 0", _OF_POOL),
    Bug(_POOL, "or (memory.micro_batches > 0 and not torch.is_grad_enabled())", "", _OF_POOL),
    # ---- benchmarks --------------------------------------------------------------------------------------
    Bug(_MEASURE, 'times["T_select"] - times["T_select_naive"]', 'times["T_select_naive"] - times["T_select"]', _EP),
    Bug(_MEASURE, 'times["T_seq"] / times["T_overlapped"]', 'times["T_overlapped"] / times["T_seq"]', _EP),
    Bug(_MEASURE, 'times["T_comm"] / times["T_seq"]', 'times["T_comm"] / times["T_comp"]', _EP),
    Bug(_MEASURE, "times=2 if settings.backward else 1", "times=1", "tests/bench/test_ep_backward.py"),
    Bug(
        "moe_lightning/bench/ep/movement.py",
        "for _ in range(times):",
        "for _ in range(1):",
        "tests/bench/test_ep_commands.py -k twice",
    ),
    Bug(
        "moe_lightning/bench/cli.py",
        "sinkhorn_iters=flags.sinkhorn_iters",
        "sinkhorn_iters=10",
        "tests/bench/test_parts.py -k settings",
    ),
    Bug(
        "moe_lightning/bench/cli.py",
        '"iterations": self.sinkhorn_iters',
        '"iterations": 10',
        "tests/bench/test_parts.py -k reach",
    ),
    Bug(_STEP, "(total(losses[-1]) / self.accumulate)", "total(losses[-1])", _OF_STEP),
    Bug(_STEP, "clip_by_norm(self._optimizer, self._clip_norm)", "pass", _OF_STEP),
    Bug(
        "moe_lightning/bench/step/models.py",
        "sizes.top_k * sizes.mlp_hidden_dim",
        "sizes.mlp_hidden_dim",
        "tests/bench/test_step_command.py -k active_flops",
    ),
    Bug(
        "moe_lightning/bench/step/models.py",
        'group["lr"] = 0.0',
        "pass",
        "tests/bench/test_step_command.py -k stay_once_trained",
    ),
    Bug(
        "moe_lightning/bench/step/measure.py",
        "gradient - sum(spent.values())",
        "gradient",
        "tests/bench/test_step_command.py -k parts_are_the_step",
    ),
    # ---- memory ------------------------------------------------------------------------------------------
    Bug(
        "moe_lightning/layers/recompute.py",
        "return next(self._given)",
        "return select()",
        "tests/models/test_recompute.py -k otherwise",
    ),
    Bug(_MODULE, "with run.product_weights():", "if True:", "tests/training/test_recompute_flag.py -k cast_once"),
    Bug(_CROSS_ENTROPY, "grad = grad / ctx.tokens", "pass", "tests/training/test_cross_entropy.py -k fp32"),
    Bug(_CROSS_ENTROPY, "probabilities_CV - 1, prob", "probabilities_CV, prob", "tests/training/test_cross_entropy.py"),
]
