"""Every checkpoint as ONNX too, while training goes on."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import lightning as L
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from typing_extensions import override

from moe_lightning.export import check_packages
from moe_lightning.utils.checks import check_choice

if TYPE_CHECKING:
    from moe_lightning.export.checkpoint_sync import CheckpointSync


class OnnxExport(Checkpoint):
    """Writes each checkpoint of a `ModelCheckpoint` as ONNX too, into the folder `x.onnx` next to `x.ckpt`.

    `best` and `last` are links to folders, and the folders of deleted checkpoints go. The weights are read from the
    checkpoint itself, so they are its own, and whole where a strategy spreads them over ranks. The model is traced at
    the first checkpoint; later ones cost the writing of the weights. Comes after `ModelCheckpoint` in the callbacks.

    Args:
        enabled: off costs nothing.
        on_error: warn: an export that fails costs a warning, once, and training goes on; raise: the run ends.
        verify: which exports are run in onnxruntime and compared with the model: first, always or never. Later ones
            have the graph of the first.
    """

    def __init__(
        self,
        enabled: bool = True,
        on_error: Literal["warn", "raise"] = "warn",
        verify: Literal["first", "always", "never"] = "first",
    ) -> None:
        check_choice("onnx_export", "on_error", on_error, ("warn", "raise"))
        check_choice("onnx_export", "verify", verify, ("first", "always", "never"))
        self.enabled = enabled
        self.on_error = on_error
        self.verify: Literal["first", "always", "never"] = verify
        self._module: L.LightningModule | None = None
        self._sync: CheckpointSync | None = None
        self._checkpoints: ModelCheckpoint | None = None
        self._seen: tuple[Any, ...] = ()
        self._warned = False

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Copy the model's structure, before a strategy spreads it."""
        if not self.enabled or stage != "fit":
            return
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        before = [c for c in callbacks[: callbacks.index(self)] if isinstance(c, ModelCheckpoint)]
        if len(before) != 1:
            raise ValueError(
                f"onnx_export: one ModelCheckpoint must come before it in the callbacks, got {len(before)}; list one"
            )
        [self._checkpoints] = before
        self._seen = self._saved()
        if self._module is not pl_module:
            check_packages()
            from moe_lightning.export.checkpoint_sync import CheckpointSync
            from moe_lightning.export.moe_forms import without_weights  # onnxruntime is not for runs without it

            self._module, self._warned = pl_module, False
            network: Any = pl_module.network
            self._sync = CheckpointSync(without_weights(network), self.verify)

    @override
    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self._update(trainer)

    @override
    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._update(trainer)

    on_train_epoch_end = on_validation_end
    on_train_end = on_validation_end

    @override
    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        if trainer.world_size == 1:
            with suppress(ValueError):  # the exception is to be seen
                self._update(trainer)

    def folder_of(self, checkpoint: str) -> Path | None:
        """The ONNX folder of a checkpoint, if it has one."""
        if self._sync is None or not checkpoint:
            return None
        from moe_lightning.export.checkpoint_sync import onnx_folder

        folder = onnx_folder(Path(checkpoint))
        return folder if folder.is_dir() else None

    def _saved(self) -> tuple[Any, ...]:
        """Changes with every save, on all ranks the same."""
        source = self._checkpoints
        assert source is not None
        step = source._last_global_step_saved
        return step, source.best_model_path, source.last_model_path, tuple(source.best_k_models)

    def _update(self, trainer: L.Trainer) -> None:
        if self._checkpoints is None or self._saved() == self._seen:
            return
        self._seen = self._saved()
        reason = self._sync_on_rank_zero(trainer)
        # The other ranks wait here, for longer than a collective may take, and learn whether to go on.
        trainer.strategy.barrier("onnx_export")
        reason = trainer.strategy.broadcast(reason)
        if reason is None:
            return
        if self.on_error == "raise":
            raise ValueError(f"onnx_export: every checkpoint must become an ONNX folder, got {reason}")
        if not self._warned:
            self._warned = True
            rank_zero_warn(f"onnx_export: training goes on without the ONNX folder of a checkpoint, got {reason}")

    def _sync_on_rank_zero(self, trainer: L.Trainer) -> str | None:
        """What went wrong, in one line."""
        if not trainer.is_global_zero:
            return None
        source = self._checkpoints
        assert source is not None
        assert self._sync is not None
        home = Path(str(source.dirpath)).absolute()

        def saved(path: str) -> Path | None:
            """Absolute, if it is of this run's folder."""
            there = Path(path).absolute()
            return there if path and home in there.parents and there.is_file() else None

        best, last = saved(source.best_model_path), saved(source.last_model_path)
        kept = [path for path in (*map(saved, source.best_k_models), best) if path is not None]
        try:
            self._sync.update(home, kept, best, last)
        except Exception as error:
            return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        return None
