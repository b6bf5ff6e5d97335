"""One command line: a flag has the same name and the same aliases on every command."""

import importlib

import pytest

from moe_lightning.bench.__main__ import COMMANDS
from moe_lightning.bench.cli import Parser
from moe_lightning.utils.cli import ALIASES


class Parsed(Exception):
    """In place of a run."""


@pytest.fixture
def parser_of(monkeypatch):
    def parse(self, arguments):
        raise Parsed(self)

    monkeypatch.setattr(Parser, "parse_args", parse)
    monkeypatch.setattr(Parser, "parse_known_args", parse)

    def parser_of(command):
        with pytest.raises(Parsed) as parsed:
            importlib.import_module(COMMANDS[command]).main([])
        return parsed.value.args[0]

    return parser_of


@pytest.mark.parametrize("command", COMMANDS)
def test_every_flag_has_its_aliases(command, parser_of):
    parser = parser_of(command)
    assert parser.component == f"bench.{command}"
    others = {alias for aliases in ALIASES.values() for alias in aliases} - set(ALIASES)
    for action in parser._actions:
        first = next(iter(action.option_strings), "")
        assert first not in others
        assert set(action.option_strings) >= set(ALIASES.get(first, ()))


SIZES = ("--num_experts", "--top_k", "--mlp_hidden_dim", "--d_model")


@pytest.mark.parametrize(
    ("command", "flags"),
    [
        ("router", ("--routers", "--all_routers", "--tokens", *SIZES)),
        ("layer", ("--routers", "--all_routers", "--tokens", *SIZES, "--baselines")),
        ("ep", ("--routers", "--all_routers", "--tokens", *SIZES)),
        ("ops", ("--tokens", "--num_experts", "--top_k")),
        ("timing", (*SIZES, "--n_layers", "--n_heads")),
        ("export", ("--router", *SIZES, "--n_layers", "--n_heads")),
        ("quickstart", ("--routers",)),
    ],
)
def test_flags_of_one_thing_have_one_name(command, flags, parser_of):
    known = {action.option_strings[0] for action in parser_of(command)._actions if action.option_strings}
    assert known >= set(flags)


def test_an_alias_is_the_flag():
    parser = Parser("layer", None)
    parser.add_routers(("naive_topk", "sinkhorn"), "naive_topk", "fp16")
    parser.add_layer()
    typed = ["--strategy", "sinkhorn", "--experts", "4", "--moe_top_k", "1", "--ffn", "8", "--all_strategies"]
    flags = parser.parse_args(typed)
    assert (flags.routers, flags.num_experts, flags.top_k, flags.mlp_hidden_dim) == (["sinkhorn"], 4, 1, 8)
    assert flags.all_routers
    assert parser.parse_args(["--router", "sinkhorn", "--moe_n_experts", "4", "--hidden_dim", "8"]).num_experts == 4
