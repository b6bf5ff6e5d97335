"""`train.py` that also writes, on each rank, what a test wants to compare."""

import hashlib
import json

from moe_lightning.callbacks import ExpertLoadMonitor
from moe_lightning.training.cli import MoECLI
from moe_lightning.training.language_module import LanguageModule

losses: list[float] = []
step = LanguageModule.training_step


def recording(self, *args):
    outcome = step(self, *args)
    losses.append(outcome["loss"].item())
    return outcome


class ReportingCLI(MoECLI):
    def after_fit(self):
        monitor = next(c for c in self.trainer.callbacks if isinstance(c, ExpertLoadMonitor))
        self.report(
            run_load=monitor.run_load().counts_LE.tolist(),
            **{"val/loss": float(self.trainer.callback_metrics["val/loss"])},
        )

    def after_predict(self):
        self.report()

    def report(self, **facts):
        weights = b"".join(p.detach().numpy().tobytes() for p in self.model.parameters())
        facts |= {"rank": self.trainer.global_rank, "weights": hashlib.sha256(weights).hexdigest(), "losses": losses}
        with open(f"rank-{self.trainer.global_rank}.json", "w") as file:
            json.dump(facts, file)


if __name__ == "__main__":
    LanguageModule.training_step = recording
    ReportingCLI()
