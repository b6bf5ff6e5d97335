"""What all language models share in training: loss, optimizer, checkpoints, generation.

Legend: B batch, S sequence, V vocabulary, L MoE layers, E experts.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Self, cast, get_args

import lightning as L
import torch
from lightning.pytorch.plugins import Precision
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import Optimizer
from torchmetrics import MeanMetric
from typing_extensions import override

from moe_lightning.data import TextDataModule
from moe_lightning.layers.low_precision import Linear
from moe_lightning.models import Decoder, LMHidden, LMOutput, MLPDecoder, generate
from moe_lightning.models.hyperparameters import (
    CLASS_PATH,
    argument_names,
    import_path,
    plain_arguments,
    router_factory,
    stored_arguments,
)
from moe_lightning.training.cross_entropy import (
    LARGE_VOCABULARY,
    CrossEntropy,
    compiled,
    cross_entropy,
    linear_cross_entropy,
    tokens_per_chunk,
)
from moe_lightning.training.graphed_step import CudaGraph, Losses, total, why_never
from moe_lightning.training.optimizer import AdamW, OptimizerConfig, build_optimizer, build_schedule, clip_by_norm
from moe_lightning.training.optimizer_step import MicroBatches, adds_gradients, copies_dtype
from moe_lightning.utils.checkpoint_file import load_checkpoint
from moe_lightning.utils.checks import check_choice, check_not_negative, check_sizes
from moe_lightning.utils.memory import check_step_fits


class LanguageModule(L.LightningModule):
    """Trains a model that maps token ids (B, S) to `LMOutput`; a batch is int64 (B, S + 1).

    Of a large vocabulary our models make no logits in training and evaluation, see `linear_cross_entropy`.

    Args:
        network: the model; its `architecture` (names and values) must be that of a checkpoint loaded into it.
        optimizer: optimizer and schedule; defaults if None.
        compile: `torch.compile` the regions between the routing phases, which stay eager so that they can be timed;
            None: in a fit on a GPU.
        cuda_graph: auto: forward and backward of a micro-batch are CUDA graphs where they can be, see `GraphedStep`.
        max_new_tokens: tokens that `predict` adds to a prompt at most; it stops at the end of the text.
        temperature: sampling temperature of `predict`; 0 is greedy.
    """

    def __init__(
        self,
        network: nn.Module,
        optimizer: OptimizerConfig | None = None,
        compile: bool | None = None,
        cuda_graph: CudaGraph = "auto",
        max_new_tokens: int = 200,
        temperature: float = 0.8,
    ) -> None:
        super().__init__()
        check_sizes("model", max_new_tokens=max_new_tokens)
        check_not_negative("model", "temperature", temperature)
        check_choice("model", "cuda_graph", cuda_graph, get_args(CudaGraph))
        self.network = network
        self.optimizer_config = replace(optimizer or OptimizerConfig())
        self.max_new_tokens = max_new_tokens
        self.temperature = temperature
        self._compile, self._cuda_graph = compile, cuda_graph
        #: Losses of the micro-batches in the gradient.
        self._accumulated: list[dict[str, Tensor]] = []
        self._micro_batches: MicroBatches | None = None
        self._cross_entropy: CrossEntropy = cross_entropy
        self._compiled_loss = False
        self.evaluation_loss = MeanMetric(nan_strategy="disable")  # a NaN must be seen
        self._save_arguments()
        if compile:
            self.compile_regions()

    @override
    def setup(self, stage: str) -> None:
        """Compile where that is the default."""
        if self._compile is not None or stage != "fit" or self.trainer.strategy.root_device.type != "cuda":
            return
        if reason := why_not_compile():
            rank_zero_info(f"compile: eager; {reason}")
            return
        self._compile = True
        rank_zero_info("compile: the first steps compile blocks and loss; --model.compile false leaves them eager")
        self.compile_regions()

    def _save_arguments(self) -> None:
        """Those of the class in hand, defaults included, in `hparams`: logged, and stored in every checkpoint."""
        self.save_hyperparameters(ignore=["network"])
        names = argument_names(type(self))  # Lightning also collects those of a module that makes this one
        arguments = plain_arguments({name: value for name, value in self.hparams.items() if name in names})
        self.hparams.clear()
        self.save_hyperparameters(
            {CLASS_PATH: import_path(type(self)), **arguments, "optimizer": asdict(self.optimizer_config)}
        )

    @override
    @classmethod
    def load_from_checkpoint(
        cls,
        checkpoint_path: Any,
        map_location: Any = None,
        hparams_file: Any = None,
        strict: bool | None = None,
        weights_only: bool | None = None,
        **kwargs: Any,
    ) -> Self:
        """The module that was saved, its arguments read as plain types; a file that has a digest is verified.

        Args:
            checkpoint_path: a local file.
            map_location: as in `torch.load`; the module is on the device of the loaded weights. None: the CPU.
            hparams_file: not taken: a checkpoint holds its arguments.
            strict: whether the weights must be exactly the module's; None: yes.
            weights_only: always.
            kwargs: arguments in place of the stored ones.

        Raises:
            ValueError: the file is missing or damaged, or of a class with other arguments.
        """
        if hparams_file is not None or weights_only is False:
            raise ValueError(
                f"checkpoint: arguments and plain types are read from {checkpoint_path} alone, got "
                f"hparams_file={hparams_file}, weights_only={weights_only}; give arguments by name"
            )
        checkpoint = load_checkpoint(Path(checkpoint_path), map_location or "cpu", require_digest=False)
        stored = stored_arguments(checkpoint)
        saved_by = stored.pop(CLASS_PATH, "another program")
        if foreign := sorted(set(stored) - argument_names(cls)):
            raise ValueError(
                f"checkpoint: its class must take its arguments, got {cls.__name__}, which takes no "
                f"{', '.join(foreign)}; load it with {saved_by}"
            )
        if isinstance(stored.get("optimizer"), dict):
            stored["optimizer"] = OptimizerConfig(**stored["optimizer"])
        if "router" in stored and "router" not in kwargs:
            stored["router"] = router_factory(stored["router"])
        module = cls(**{**stored, **kwargs})
        module.on_load_checkpoint(checkpoint)
        module.load_state_dict(checkpoint["state_dict"], strict=module.strict_loading if strict is None else strict)
        return module.to(next(iter(checkpoint["state_dict"].values())).device)

    @property
    def learning_rate(self) -> float:
        """The peak, under the name that Lightning's learning-rate finder sets; also while training."""
        return self.optimizer_config.learning_rate

    @learning_rate.setter
    def learning_rate(self, value: float) -> None:
        self.optimizer_config.learning_rate = value
        self.hparams["optimizer"]["learning_rate"] = value

    def compile_regions(self) -> None:
        """Compile the network's blocks and the loss, or all of a network without blocks."""
        self._cross_entropy, self._compiled_loss = compiled(cross_entropy), True
        if isinstance(self.network, Decoder):
            self.network.compile_blocks()
        else:
            self.network.compile()

    def loss_region(self, loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """A loss, compiled where the blocks are."""
        return compiled(loss) if self._compiled_loss else loss

    @override
    def forward(self, tokens_BS: Tensor) -> LMOutput:
        """Logits of the next token at every position."""
        return self.network(tokens_BS)

    def auxiliary_losses(self, output: LMOutput | LMHidden) -> dict[str, Tensor]:
        """Named losses added to the cross-entropy in training, coefficients applied.

        The output has hidden states in place of logits where the vocabulary is large.
        """
        return {}

    @override
    def on_train_batch_start(self, batch: Tensor, batch_idx: int) -> None:
        """Refuse a step that host memory cannot hold before it is tried."""
        if batch_idx > 0 or self.device.type != "cpu":
            return
        weights = sum(p.numel() * p.element_size() for p in self.parameters())
        size, seq_len, vocab_size = batch.shape[0], batch.shape[1] - 1, getattr(self.network, "vocab_size", 0)
        given = f"data.batch_size={size}, data.seq_len={seq_len}, vocab_size={vocab_size}"
        tokens = size * seq_len
        if _head_in_chunks(self.network) is not None:
            tokens = min(tokens, tokens_per_chunk(vocab_size))
        check_step_fits(weights, tokens * vocab_size, given, self.trainer.num_devices)

    @override
    def training_step(self, tokens: Tensor, batch_idx: int) -> dict[str, Any]:
        """Next-token cross-entropy in nats per token, plus the auxiliary losses; an optimizer step logs their means."""
        divisor = self.trainer.accumulate_grad_batches
        first = batch_idx % divisor == 0  # where Lightning begins a gradient
        run = self._micro_batches
        losses = self.losses(tokens) if run is None else run.run(tokens, first, divisor)
        if first:
            self._accumulated.clear()
        self._accumulated.append({name: value.detach() for name, value in losses.items()})
        if not self.trainer.fit_loop._should_accumulate():
            for name in self._accumulated[0]:
                mean = torch.stack([of_batch[name] for of_batch in self._accumulated]).mean()
                self.log(f"train/{name}", mean, prog_bar=name == "loss")
            rate = self.trainer.optimizers[0].param_groups[0]["lr"]
            self.log("train/learning_rate", torch.tensor(rate))  # of a plain float Lightning makes a copy that waits
        return {"loss": total(losses)}

    def losses(self, tokens: Tensor) -> Losses:
        """Of a micro-batch (B, S + 1): "loss", the cross-entropy, then the auxiliary losses."""
        output, loss = self._predict_next(tokens)
        return {"loss": loss, **self.auxiliary_losses(output)}

    @override
    def on_train_start(self) -> None:
        """Choose how micro-batches are run."""
        graphed = self._cuda_graph == "auto"
        if graphed and (reason := why_never(self.trainer, self)):
            graphed = False
            if self.trainer.strategy.root_device.type == "cuda":
                rank_zero_info(f"cuda_graph: eager, {reason}")
        copies = copies_dtype(self.trainer.precision_plugin, self.trainer.accumulate_grad_batches)
        callbacks = self.trainer.callbacks  # type: ignore[attr-defined]
        adds = adds_gradients(self.trainer.strategy, self)
        self._micro_batches = MicroBatches(self, self.losses, self.network, copies, adds, graphed, callbacks)

    @override
    def teardown(self, stage: str) -> None:
        if self._micro_batches is not None:
            self._micro_batches.close()
            self._micro_batches = None

    @override
    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Of a loss whose gradient is not there yet."""
        run = self._micro_batches
        if run is None:
            super().backward(loss, *args, **kwargs)
        elif not run.backward_done:
            with run.eager_pass():  # what is computed again reads what the forward pass read
                super().backward(loss, *args, **kwargs)

    @override
    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Optimizer) -> None:
        """Where there are graphs, in the memory that they write to."""
        if self._micro_batches is None or not self._micro_batches.zero_gradients():
            super().optimizer_zero_grad(epoch, batch_idx, optimizer)

    @override
    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Make the gradient the mean over its micro-batches where an epoch ends before accumulation is full.

        Lightning divides each by `accumulate_grad_batches`, however many there are.
        """
        full, there = self.trainer.accumulate_grad_batches, len(self._accumulated)
        if 0 < there < full:
            gradients = [p.grad for p in self.parameters() if p.grad is not None]
            torch._foreach_mul_(gradients, full / there)

    @override
    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """By norm within the update of our `AdamW`, which saves a pass over the gradients; else as Lightning does."""
        clip: Any = self.trainer.precision_plugin.clip_grad_by_norm
        lightnings = getattr(clip, "__func__", None) is Precision.clip_grad_by_norm
        if (
            isinstance(optimizer, AdamW)
            and lightnings
            and gradient_clip_val
            and gradient_clip_algorithm in (None, "norm")
        ):
            clip_by_norm(optimizer, gradient_clip_val)
        else:
            super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)

    @override
    def validation_step(self, tokens: Tensor, batch_idx: int) -> None:
        self._evaluate(tokens)

    @override
    def test_step(self, tokens: Tensor, batch_idx: int) -> None:
        self._evaluate(tokens)

    @override
    def predict_step(self, tokens: Tensor, batch_idx: int) -> Tensor:
        """Continue a prompt (B, S) by up to `max_new_tokens` sampled tokens.

        With a `TextDataModule` to the end of the text, seeing the last seq_len tokens; with dataloaders of one's own
        all tokens are seen and `max_new_tokens` are added.
        """
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        text = data if isinstance(data, TextDataModule) else None
        return generate(
            self.network,
            tokens,
            self.max_new_tokens,
            context_length=text.hparams["seq_len"] if text else tokens.shape[1] + self.max_new_tokens,
            temperature=self.temperature,
            eos_id=text.eos_id if text else None,
        )

    @override
    def on_validation_epoch_end(self) -> None:
        """Log val/loss (nats per token) and val/perplexity."""
        self._log_evaluation("val")

    @override
    def on_test_epoch_end(self) -> None:
        """Log test/loss (nats per token) and test/perplexity."""
        self._log_evaluation("test")

    @override
    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW under warm-up and schedule, stepped once per optimizer step."""
        scaled = getattr(self.trainer.precision_plugin, "scaler", None) is not None
        optimizer = build_optimizer(self.network, self.optimizer_config, scaled)
        steps = float(self.trainer.estimated_stepping_batches)
        schedule = build_schedule(optimizer, self.optimizer_config, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store the sizes that a model must have to load the weights; Lightning stores the arguments."""
        checkpoint["architecture"] = self.network.architecture

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another architecture before any tensor is compared."""
        check_same_architecture(checkpoint.get("architecture"), cast(dict, self.network.architecture))

    def _predict_next(self, tokens: Tensor, reduction: str = "mean") -> tuple[LMOutput | LMHidden, Tensor]:
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        head = _head_in_chunks(self.network)
        if head is None:
            output = self.network(inputs)
            return output, self._cross_entropy(output.logits_BSV, targets, reduction)
        hidden = self.network(inputs, logits=False)
        return hidden, linear_cross_entropy(hidden.hidden_BSD, head.weight, targets, reduction, self._compiled_loss)

    def _evaluate(self, tokens: Tensor) -> None:
        """Of every token by itself: a batch may be smaller than others, or of no window on this rank."""
        self.evaluation_loss.update(self._predict_next(tokens, reduction="none")[1])

    def _log_evaluation(self, stage: str) -> None:
        loss = self.evaluation_loss.compute()
        self.evaluation_loss.reset()
        self.log(f"{stage}/loss", loss, prog_bar=True)
        self.log(f"{stage}/perplexity", loss.exp())


def _head_in_chunks(network: nn.Module) -> nn.Linear | None:
    """The head of one of our models if its logits are to be made in chunks: hooks on a head see all of them."""
    if not isinstance(network, (Decoder, MLPDecoder)) or network.vocab_size < LARGE_VOCABULARY:
        return None
    head = network.head
    plain = type(head) in (nn.Linear, Linear) and head.bias is None
    return head if plain and not head._forward_hooks and not head._forward_pre_hooks else None


def why_not_compile() -> str | None:
    """What torch.compile lacks on a GPU, which is Triton and the C compiler that Triton calls; None: nothing."""
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    if compiler is not None and importlib.util.find_spec("triton") is not None:
        return None
    return "torch.compile needs triton and a C compiler on PATH"


def check_same_architecture(saved: dict[str, Any] | None, current: dict[str, Any]) -> None:
    """Raise ValueError naming each field that differs, saved and current."""
    if saved is None:
        raise ValueError("checkpoint: it must hold an 'architecture', got none; it was not written by moe_lightning")
    fields = [*saved, *(field for field in current if field not in saved)]
    differences = [
        f"{field} saved={saved.get(field, 'none')} current={current.get(field, 'none')}"
        for field in fields
        if saved.get(field) != current.get(field)
    ]
    if differences:
        raise ValueError(
            f"checkpoint: the model must have the saved sizes, got {'; '.join(differences)}; "
            "use the configuration it was trained with"
        )
