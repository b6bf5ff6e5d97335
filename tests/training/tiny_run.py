"""A small corpus, a tiny model, and the command line in this process."""

import hashlib
from pathlib import Path

import pytest
import torch

from moe_lightning.training.cli import MoECLI
from moe_lightning.training.language_module import LanguageModule
from moe_lightning.utils.errors import plain_errors

ROOT = Path(__file__).parents[2]

SIZES = {"d_model": 16, "n_heads": 2, "n_layers": 2, "mlp_hidden_dim": 16, "num_experts": 4, "top_k": 2}
MODEL = ["--model=decoder_moe", *(f"--model.{name}={value}" for name, value in SIZES.items())]
DATA = ["--data.path=text.txt", "--data.seq_len=16", "--data.batch_size=2", "--data.cache_dir=cache"]
# Two steps to log, no bar to draw.
TRAINER = ["--trainer.accelerator=cpu", "--trainer.devices=1", "--progress_bar.refresh_rate=0"]
TINY = [*MODEL, *DATA, *TRAINER]


def text(characters: int) -> str:
    """Text that never repeats: 90 % of it is trained on, 5 % validated, 5 % tested."""
    blocks = (hashlib.sha256(str(i).encode()).hexdigest()[:7] + " " for i in range(characters // 8 + 1))
    return "".join(blocks)[:characters]


def run_cli(command: str, *arguments: str, tiny: list[str] = TINY) -> MoECLI:
    """`train.py command ...` in this process; `arguments` stand behind the tiny run's own."""
    commands = MoECLI.subcommands()

    class OneCommand(MoECLI):
        """Without the parsers of the others: two thirds of the time."""

        @staticmethod
        def subcommands():
            return {command: commands[command]} if command in commands else commands

    return OneCommand(args=[command, *tiny, *arguments])


def error_line(capsys: pytest.CaptureFixture, command: str, *arguments: str, tiny: list[str] = TINY) -> str:
    """Run `train.py`, which must exit with 2 and print exactly one line, which begins with "error: "."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop, plain_errors():
        run_cli(command, *arguments, tiny=tiny)
    printed = capsys.readouterr().err.lstrip("\n")  # a progress bar that goes leaves an empty line
    assert stop.value.code == 2
    assert printed.startswith("error: "), printed
    assert printed.endswith("\n"), printed
    assert printed.count("\n") == 1, printed
    return printed.removeprefix("error: ").rstrip("\n")


def first_router(cli: MoECLI) -> torch.nn.Module:
    return cli.model.network.moe_layers[0].router


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with 4,000 characters in text.txt; all that a run writes stays in it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(text(4000))
    return tmp_path


@pytest.fixture
def parsed(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """`parsed(*arguments)`: the command line up to the point where fitting would start."""
    monkeypatch.setattr("lightning.Trainer.fit", lambda *args, **kwargs: None)
    return lambda *arguments, tiny=TINY: run_cli("fit", *arguments, tiny=tiny)


@pytest.fixture
def losses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The loss of every micro-batch trained on, in order."""
    recorded: list[float] = []
    step = LanguageModule.training_step

    def recording(self, *args):
        outcome = step(self, *args)
        recorded.append(outcome["loss"].item())
        return outcome

    monkeypatch.setattr(LanguageModule, "training_step", recording)
    return recorded
