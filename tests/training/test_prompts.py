"""What `predict` is given and what it prints: prompts as they were typed, text to its first end."""

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from tiny_run import TINY, TRAINER, error_line, run_cli

from moe_lightning.models import DecoderMoE, LMOutput
from moe_lightning.training.config import expand_arguments

#: YAML, argparse and jsonargparse see something else in each of these.
TEXTS = [
    "[1, 2]",
    "[a, b]",
    "null",
    "@file",
    "- x",
    "{a: b}",
    "{model: 5}",
    "model: mlp",
    "1e3",
    "true",
    "  two spaces, and at the end  ",
    "\ta tab\nand lines\n\n",
    "-h",
    "--help",
    "--model.help",
    "--data.prompt=x",
    "-",
    "'",
    '"\\n"',
    "#",
    "a: &b [*b]",
    "!!python/object:x",
    "café 😀 \u2028 \x85 \x01",
    "",
]


@pytest.fixture
def prompts(parsed):
    """`prompts(*arguments)`: what the data module was given."""
    return lambda *arguments: parsed(*arguments).datamodule._prompts


def test_text_on_the_command_line_is_the_prompt_whatever_its_first_characters(prompts):
    assert prompts(*(f"--data.prompt={text}" for text in TEXTS)) == TEXTS
    assert prompts(*(part for text in TEXTS for part in ("--data.prompt", text))) == TEXTS


@pytest.mark.parametrize("text", ["[a, b]", "null"])
def test_one_text_is_one_prompt(prompts, text):
    assert prompts("--data.prompt", text) == [text]


def test_prompts_of_a_configuration_give_way_to_those_of_the_command_line(prompts, folder):
    (folder / "run.yaml").write_text("data: {prompt: [one, two]}")
    assert prompts("--config=run.yaml") == ["one", "two"]
    assert prompts("--config=run.yaml", "--data.prompt", "three") == ["three"]


@given(st.lists(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])), min_size=1))
def test_any_text_comes_through(texts):
    [argument] = expand_arguments([part for text in texts for part in ("--data.prompt", text)])
    assert yaml.load(argument.removeprefix("--data.prompt="), getattr(yaml, "CSafeLoader", yaml.SafeLoader)) == texts


def test_bytes_that_are_no_text_are_refused(folder, capsys):
    assert error_line(capsys, "predict", "--data.prompt", "caf\udce9") == (
        "data: prompt must be UTF-8 text, got 'caf\\udce9'; convert it"
    )


def test_a_prompt_without_text_is_the_parsers_error(folder, capsys):
    assert "--data.prompt" in error_line(capsys, "predict", "--data.prompt")


@pytest.fixture
def abc(monkeypatch):
    """Every model writes a, b, c and the end of text (256), over and over."""
    following = torch.zeros(320, dtype=torch.int64)
    following[[ord("a"), ord("b"), ord("c"), 256]] = torch.tensor([ord("b"), ord("c"), 256, ord("a")])

    def forward(self, tokens_BS):
        return LMOutput(torch.nn.functional.one_hot(following[tokens_BS], 320) * 50.0)

    monkeypatch.setattr(DecoderMoE, "forward", forward)


@pytest.mark.parametrize(("prompt", "printed"), [("a", "abc"), ("xa", "xabc"), ("", "abc"), ("c", "c")])
def test_predict_prints_a_text_to_its_first_end(folder, capsys, abc, prompt, printed):
    options = ["--model.temperature=0", "--model.max_new_tokens=20", f"--data.prompt={prompt}"]
    run_cli("predict", *options, tiny=[*TINY[:-1], *TRAINER])
    lines = [line.strip("│ ") for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    assert lines == [printed]
