"""A fit whose state is its step: the only weight counts the optimizer steps, the validation losses are given."""

import lightning as L
import torch

from moe_lightning.callbacks import ExactResume, GracefulStop, RunCheckpoint
from moe_lightning.training.resume import VerifiedCheckpointIO
from moe_lightning.utils.checkpoint_file import load_checkpoint

BATCHES = 8  # of an epoch


class Stream:
    """Batches 0, 1, 2, ... for ever, an epoch's worth an iteration; keeps its place as `TrainLoader` does."""

    def __init__(self, trainer):
        self.trainer, self.place = trainer, 0

    def __len__(self):
        return BATCHES

    def __iter__(self):
        for _ in range(BATCHES):
            self.place += 1
            yield torch.tensor([self.place - 1])

    def state_dict(self):
        progress = self.trainer().fit_loop.epoch_loop.batch_progress.current
        return {"batches": self.place - (progress.ready - progress.processed)}

    def load_state_dict(self, state):
        self.place = state["batches"]


class Counter(L.LightningModule):
    """The weight grows by exactly 1 with each optimizer step, and a random number is drawn in each batch.

    Args:
        losses: of the validations, by step; 9 where none is given.
        fail: `hook name, call` of the call that raises, counted from 1.
    """

    def __init__(self, losses=None, fail=None):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.losses = losses or {}
        self.fail = fail
        self.calls = {}
        self.seen = []  # batches, and what was drawn with them, of optimizer steps that were taken
        self.begun = []

    def _count(self, hook):
        self.calls[hook] = self.calls.get(hook, 0) + 1
        if self.fail == (hook, self.calls[hook]):
            raise RuntimeError("power cut")

    def training_step(self, batch):
        self.begun.append((batch.item(), torch.rand(()).item()))
        self._count("training_step")
        self.log("train/loss", float(self.global_step))
        return -self.weight

    def optimizer_step(self, *arguments, **options):
        super().optimizer_step(*arguments, **options)
        self._count("optimizer_step")
        self.seen += self.begun
        self.begun = []

    def on_before_optimizer_step(self, optimizer):
        self.weight.grad.fill_(-1.0)  # however many batches were accumulated

    def on_train_batch_end(self, *arguments):
        self._count("on_train_batch_end")

    def validation_step(self, batch):
        self._count("validation_step")
        self.log("val/loss", self.losses.get(self.global_step, 9.0))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 1.0)


class At(L.Callback):
    """Does something once, at the given call of a hook, counted from 1."""

    def __init__(self, hook, call, action):
        self.calls = 0

        def count(trainer, *arguments, **named):
            self.calls += 1
            if self.calls == call:
                action(trainer)

        setattr(self, hook, count)


def stop(trainer):
    trainer.should_stop = True


def counted_fit(folder, steps, *callbacks, module=None, save=None, ckpt_path=None, validation=2, **options):
    """Train; its module and trainer. Checkpoints go to `folder`."""
    module = module or Counter()
    save = {"save_last": True, "monitor": "val/loss", "filename": "step={step}-val_loss={val/loss:.3f}", **(save or {})}
    checkpoint = RunCheckpoint(folder, auto_insert_metric_name=False, **save)
    trainer = L.Trainer(
        **{
            "accelerator": "cpu",
            "max_steps": steps,
            "max_epochs": -1,
            "check_val_every_n_epoch": None,
            "num_sanity_val_steps": 0,
            "logger": False,
            "default_root_dir": folder,
            "plugins": [VerifiedCheckpointIO()],
            "callbacks": [ExactResume(), GracefulStop(), *callbacks, checkpoint],
            "enable_progress_bar": False,
            "enable_model_summary": False,
            **options,
        }
    )
    loader = Stream(lambda: trainer)
    try:
        trainer.fit(module, loader, torch.zeros(validation, 1), ckpt_path=ckpt_path, weights_only=True)
    except BaseException as error:
        error.trainer = trainer
        raise
    return module, trainer


def saved_step(path):
    """The step that a checkpoint is of, by its weight as by its counter."""
    checkpoint = load_checkpoint(path)
    assert checkpoint["state_dict"]["weight"].item() == checkpoint["global_step"]
    return checkpoint["global_step"]


def names(folder):
    return sorted(path.name for path in folder.iterdir())
