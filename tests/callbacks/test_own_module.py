"""The callbacks on a LightningModule of one's own: they read its MoE layers, not what its steps return."""

import math

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny_fit import BATCH, SEQ_LEN, Batches, RecordingLogger
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from moe_lightning.callbacks import ExpertLoadMonitor, RouterGuard, RouterTiming, Throughput
from moe_lightning.callbacks.base import moe_layers
from moe_lightning.layers import Experts, MoE
from moe_lightning.models import DecoderMoE, DecoderMoEConfig
from moe_lightning.routers import NaiveTopK

D, EXPERTS, TOP_K, VOCABULARY = 16, 4, 2, 64


def moe(experts=EXPERTS):
    return MoE(NaiveTopK(D, experts, TOP_K), Experts(D, 16, experts))


class Own(L.LightningModule):
    """Nothing of ours but the layers; `returns` makes what a step returns of its loss."""

    def __init__(self, returns=lambda loss: loss, validation_returns=lambda loss: None, layers=None, recompute=False):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(VOCABULARY, D)
        self.layers = nn.ModuleList(layers if layers is not None else [moe(), moe()])
        self.head = nn.Linear(D, VOCABULARY)
        self.returns, self.validation_returns, self.recompute = returns, validation_returns, recompute
        self.seen = []  # expert ids of every pass that is not a repeated one

    def forward(self, tokens_BS):
        x_BSD = self.embedding(tokens_BS)
        for layer in self.layers:
            if self.recompute and self.training:
                # tanh keeps its output, so that backward repeats the whole layer.
                x_BSD = x_BSD + checkpoint(lambda x, layer=layer: layer(x)[0].tanh(), x_BSD, use_reentrant=False)
            else:
                x_BSD = x_BSD + layer(x_BSD)[0]
        return self.head(x_BSD)

    def loss(self, batch):
        tokens = batch["tokens"] if isinstance(batch, dict) else batch
        return F.cross_entropy(self(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())

    def training_step(self, batch, batch_idx):
        return self.returns(self.loss(batch))

    def validation_step(self, batch, batch_idx):
        return self.validation_returns(self.loss(batch))

    def test_step(self, batch, batch_idx):
        return self.validation_returns(self.loss(batch))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Dicts(Batches):
    def __iter__(self):
        return iter([{"tokens": batch, "text": ["a", "b"]} for batch in self.batches])


def trainer_of(callbacks, **options):
    return L.Trainer(
        **{
            "accelerator": "cpu",
            "devices": 1,
            "max_epochs": 1,
            "logger": RecordingLogger(),
            "callbacks": callbacks,
            "log_every_n_steps": 1,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "num_sanity_val_steps": 0,
            **options,
        }
    )


def fit(callbacks, module, batches=4, validation=2, kind=Batches, **options):
    trainer = trainer_of(callbacks, **options)
    trainer.fit(module, kind(batches), kind(validation, seed=1))
    return {tag: value for step in trainer.logger.steps.values() for tag, value in step.items()}


def loads(model, batches):
    """Tokens per expert of each layer, counted from the ids of a pass by hand."""
    ids = []
    hooks = [
        layer.register_forward_hook(lambda layer, inputs, output: ids.append(output[1].selection.expert_ids_TK))
        for layer in moe_layers(model)
    ]
    with torch.no_grad():
        for batch in batches:
            model(batch[:, :-1])
    for hook in hooks:
        hook.remove()
    layers = len(hooks)
    return [
        [sum(int((layer_ids == e).sum()) for layer_ids in ids[layer::layers]) for e in range(EXPERTS)]
        for layer in range(layers)
    ]


@pytest.mark.parametrize(
    "returns",
    [lambda loss: loss, lambda loss: {"loss": loss}, lambda loss: {"loss": loss, "slots": 3}, lambda loss: None],
    ids=["tensor", "dict", "dict with more", "None"],
)
@pytest.mark.parametrize("kind", [Batches, Dicts])
def test_load_times_and_tokens_whatever_a_step_returns(returns, kind, monkeypatch):
    monkeypatch.setattr(Own, "configure_optimizers", lambda self: torch.optim.SGD(self.parameters(), lr=0.0))
    monitor, timing, rate = ExpertLoadMonitor(), RouterTiming(every_n_batches=1), Throughput()
    module = Own(returns)
    metrics = fit([monitor, timing, rate, RouterGuard()], module, kind=kind)
    assert monitor.run_load().counts_LE.tolist() == loads(module, Batches(4))
    assert "throughput/mfu" not in metrics  # nothing in the module knows its FLOPs
    assert rate._run_tokens == 3 * BATCH * SEQ_LEN  # but for the first step
    assert metrics["throughput/tokens_per_s"] > 0
    assert timing.run_times().forward["T_route"] > 0
    validated = torch.tensor(loads(module, Batches(2, seed=1))).float()
    assert metrics["expert_load_val/max_over_mean"] == pytest.approx(
        float((validated.amax(1) / validated.mean(1)).mean())
    )


class Poison(L.Callback):
    def __init__(self, at):
        self.at = at

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if batch_idx == self.at:
            with torch.no_grad():
                moe_layers(module)[-1].router.weight[1, 3] = math.nan


@pytest.mark.parametrize("returns", [lambda loss: loss, lambda loss: None], ids=["tensor", "None"])
def test_the_guard_stops_a_run_with_nan_and_saves_nothing_of_it(tmp_path, returns):
    save = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    with pytest.raises(ValueError, match=r"^router: logits must be finite .* got 32 invalid rows in a batch; "):
        fit([save, Poison(at=2), RouterGuard()], Own(returns), enable_checkpointing=True)
    assert {path.name for path in tmp_path.iterdir()} == {"step=1.ckpt", "step=2.ckpt"}


@pytest.mark.parametrize("run", ["validate", "test"])
def test_the_guard_and_the_load_in_validate_and_test(run):
    module = Own()
    getattr(trainer_of([RouterGuard(), ExpertLoadMonitor(), Throughput(), RouterTiming()]), run)(module, Batches(2))
    with torch.no_grad():
        moe_layers(module)[0].router.weight[1, 3] = math.nan
    with pytest.raises(ValueError, match=r"^router: logits must be finite"):
        getattr(trainer_of([RouterGuard()]), run)(module, Batches(2))


def test_the_whole_model_of_ours_in_a_module_of_ones_own():
    class Wrapped(Own):
        def __init__(self):
            super().__init__()
            self.layers = None
            self.model = DecoderMoE(
                DecoderMoEConfig(
                    vocab_size=VOCABULARY,
                    d_model=D,
                    n_heads=2,
                    n_layers=2,
                    mlp_hidden_dim=16,
                    num_experts=EXPERTS,
                    top_k=TOP_K,
                )
            )

        def forward(self, tokens_BS):
            return self.model(tokens_BS).logits_BSV

    monitor, rate = ExpertLoadMonitor(), Throughput(peak_flops=1e9)
    module = Wrapped()
    metrics = fit([monitor, rate, RouterGuard()], module)
    assert monitor.run_load().counts_LE.sum(1).tolist() == [4 * BATCH * SEQ_LEN * TOP_K] * 2
    flops = 3 * module.model.flops_per_token(SEQ_LEN)
    assert metrics["throughput/mfu"] == pytest.approx(metrics["throughput/tokens_per_s"] * flops / 1e9)


def test_layers_made_in_configure_model_are_read_too():
    class Late(Own):
        def __init__(self):
            super().__init__(layers=[])

        def configure_model(self):
            if not self.layers:
                self.layers = nn.ModuleList([moe()])

    monitor, timing = ExpertLoadMonitor(), RouterTiming(every_n_batches=1)
    fit([monitor, timing, RouterGuard()], Late())
    assert monitor.run_load().counts_LE.sum().item() == 4 * BATCH * SEQ_LEN * TOP_K
    assert timing.run_times().forward["T_route"] > 0


def test_a_pass_that_backward_repeats_is_counted_once():
    monitor, rate, timing = ExpertLoadMonitor(), Throughput(), RouterTiming(every_n_batches=1)
    fit([monitor, rate, timing, RouterGuard()], Own(recompute=True))
    assert monitor.run_load().counts_LE.sum(1).tolist() == [4 * BATCH * SEQ_LEN * TOP_K] * 2
    assert rate._run_tokens == 3 * BATCH * SEQ_LEN
    once_a_batch = {(layer, direction): 3 for layer in (0, 1) for direction in ("forward", "backward")}
    assert timing._run.totals._passes == once_a_batch


def test_a_compiled_layer_is_read_in_every_fit():
    torch.compiler.reset()
    module = Own(layers=[moe()])
    module.layers[0].compile(backend="eager")
    for _ in range(2):
        monitor, rate = ExpertLoadMonitor(), Throughput()
        fit([monitor, rate, RouterGuard()], module, batches=2, limit_val_batches=0)
        assert monitor.run_load().counts_LE.sum(1).tolist() == [2 * BATCH * SEQ_LEN * TOP_K]
        assert rate._run_tokens == BATCH * SEQ_LEN
    with pytest.raises(ValueError, match=r"^router: logits must be finite"):
        fit([Poison(at=1), RouterGuard()], module, batches=2, limit_val_batches=0)


def test_a_layer_that_is_called_twice_counts_twice_and_an_idle_one_not():
    class Shared(Own):
        def forward(self, tokens_BS):
            x_BSD = self.embedding(tokens_BS)
            for _ in range(2):
                x_BSD = x_BSD + self.layers[0](x_BSD)[0]
            return self.head(x_BSD)

    monitor = ExpertLoadMonitor()
    fit([monitor, RouterGuard()], Shared())
    slots = 4 * BATCH * SEQ_LEN * TOP_K
    assert monitor.run_load().counts_LE.sum(1).tolist() == [2 * slots, 0]
    assert monitor.run_load().dropped_L[0] == 0


def test_without_moe_layers_the_tokens_are_those_of_the_embedding():
    rate = Throughput()
    fit([ExpertLoadMonitor(), RouterTiming(), RouterGuard(), rate], Own(layers=[]))
    assert rate._run_tokens == 3 * BATCH * SEQ_LEN


class Plain(L.LightningModule):
    """Neither MoE layers nor tokens."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(SEQ_LEN + 1, 1)

    def training_step(self, batch, batch_idx):
        return self.linear(batch.float()).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


@pytest.mark.parametrize("unused_embedding", [False, True])
def test_tokens_that_cannot_be_known_are_not_logged_and_that_is_said_once(recwarn, unused_embedding):
    rate, module = Throughput(), Plain()
    if unused_embedding:
        module.embedding = nn.Embedding(4, 4)
    trainer = trainer_of([ExpertLoadMonitor(), RouterTiming(), RouterGuard(), rate])
    trainer.fit(module, Batches(3))
    assert not any(tag.startswith("throughput") for step in trainer.logger.steps.values() for tag in step)
    assert rate.run_tokens_per_second() is None
    said = [str(w.message) for w in recwarn if "throughput" in str(w.message)]
    assert said == [
        "throughput: a module must call MoE layers or embeddings for its tokens to be counted, got Plain, which calls "
        "none; no tokens/s is logged"
    ]


def test_layers_of_unlike_size_are_refused_by_the_load_alone():
    module = Own(layers=[moe(4), moe(8)])
    with pytest.raises(ValueError, match=r"^expert_load: .*, got num_experts=\[4, 8\]; set expert_load.enabled=false$"):
        fit([ExpertLoadMonitor()], module)
    fit([RouterGuard(), RouterTiming(), Throughput(), ExpertLoadMonitor(enabled=False)], module)


def test_the_layers_are_left_as_they_were():
    module = Own()
    fit([ExpertLoadMonitor(), RouterGuard(), Throughput(), RouterTiming()], module)
    assert not any(m._forward_hooks for m in module.modules())

    class Break(L.Callback):
        def on_before_backward(self, trainer, module, loss):
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        fit([ExpertLoadMonitor(), RouterGuard(), Throughput(), RouterTiming(), Break()], module)
    assert not any(m._forward_hooks for m in module.modules())
