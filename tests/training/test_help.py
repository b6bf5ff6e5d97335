"""What `train.py` says to someone who does not know it yet."""

import inspect
import re

import pytest
from tiny_run import error_line

from moe_lightning.routers import ROUTERS
from moe_lightning.training.cli import MoECLI
from moe_lightning.training.config import MODELS
from moe_lightning.training.modules import DecoderMoEModule
from moe_lightning.training.optimizer import OptimizerConfig


def printed(capsys, *arguments):
    with pytest.raises(SystemExit) as stop:
        MoECLI(args=list(arguments))
    assert stop.value.code == 0
    return capsys.readouterr().out


@pytest.fixture(scope="module")
def fit_help():
    with pytest.MonkeyPatch.context() as patch:
        lines = []
        patch.setattr("argparse.ArgumentParser._print_message", lambda self, message, file=None: lines.append(message))
        with pytest.raises(SystemExit) as stop:
            MoECLI(args=["fit", "--help"])
    assert stop.value.code == 0
    return "".join(lines)


def test_without_arguments_a_usage_of_two_lines(capsys):
    with pytest.raises(SystemExit) as stop:
        MoECLI(args=[])
    assert stop.value.code == 2
    assert capsys.readouterr() == (
        "",
        "usage: python train.py fit|validate|test|predict [--config FILE] [--FLAG VALUE ...]\n"
        "       python train.py --help\n",
    )


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_is_one_screen_of_flags_that_exist(capsys, fit_help, flag):
    text = printed(capsys, flag)
    assert len(text.splitlines()) <= 40
    assert max(map(len, text.splitlines())) <= 120
    assert [name for name in (*MoECLI.subcommands(), *MODELS, *ROUTERS) if name not in text] == []
    flags = set(re.findall(r"--[a-z][\w.]+", text))
    assert len(flags) > 10
    assert [flag for flag in flags if not re.search(rf"^  (-\w.*, )?{flag}\b", fit_help, re.MULTILINE)] == []


def test_help_of_a_command_lists_the_arguments_of_model_optimizer_and_router(fit_help):
    own = set(inspect.signature(DecoderMoEModule).parameters) - {"vocab_size", "kwargs"}
    own |= {"optimizer", "compile", "max_new_tokens", "temperature"}
    assert len(own) == 27
    flags = [f"--model.{name}" for name in own]
    flags += [f"--model.optimizer.{name}" for name in inspect.signature(OptimizerConfig).parameters]
    flags += [
        f"--model.router.{name}"
        for name in ("score", "renormalize", "n_group", "skew_experts", "skew_bias", "capacity_factor", "fp32_logits")
    ]
    assert [flag for flag in flags if f"\n  {flag} " not in fit_help] == []
    assert "--model.vocab_size" not in fit_help  # the data's
    assert "weight of the load-balancing loss, mean over layers" in fit_help
    assert fit_help.index("--model.d_model ") < fit_help.index("--data.path ") < fit_help.index("--trainer.max_steps ")
    assert fit_help.startswith("usage: ")
    assert len(fit_help.partition("\n\n")[0].splitlines()) <= 2


@pytest.mark.parametrize("name", MODELS)
def test_help_of_a_model_by_its_name(capsys, name):
    text = printed(capsys, "fit", "--model.help", name)
    assert "\n  --model.d_model " in text
    assert ("\n  --model.num_experts " in text) == (name == "decoder_moe")
    assert "\n  --model.temperature " in text
    assert text == printed(capsys, "fit", f"--model.help=moe_lightning.training.modules.{MODELS[name].__name__}")


@pytest.mark.parametrize("name", ROUTERS)
def test_help_of_a_router_by_its_name(capsys, name):
    text = printed(capsys, "fit", "--model", "decoder_moe", "--model.router.help", name)
    assert "\n  --model.router.capacity_factor " in text
    assert ("\n  --model.router.iterations " in text) == (name == "sinkhorn")
    assert text == printed(capsys, "fit", f"--model.router.help={ROUTERS[name].__module__}.{ROUTERS[name].__name__}")


def test_help_without_a_name_is_of_the_usual_one(capsys):
    assert printed(capsys, "fit", "--model.help") == printed(capsys, "fit", "--model.help", "decoder_moe")
    assert printed(capsys, "fit", "--model.help", "--data.path=x") == printed(capsys, "fit", "--model.help")


@pytest.mark.parametrize(
    ("flag", "says"),
    [
        ("--model.help=decodr_moe", "got 'decodr_moe'; did you mean decoder_moe?"),
        ("--model.router.help=sinkhron", "got 'sinkhron'; did you mean sinkhorn?"),
        (
            "--model.help=no.such.Thing",
            "config: --model.help must name a class, got no.such.Thing; see train.py --help",
        ),
    ],
)
def test_help_of_nothing_is_one_line(capsys, flag, says):
    assert error_line(capsys, "fit", flag).endswith(says)
