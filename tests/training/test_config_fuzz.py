"""Random values (seeded) for every field outside model and data: the run is set up, or one line says why not."""

import random

import pytest
from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser
from tiny_run import TINY, run_cli

from moe_lightning.training.cli import MoECLI
from moe_lightning.utils.errors import plain_errors

VALUES = ["-1", "0", "1.5", "-0.5", ".nan", ".inf", "nan", "1e400", "1000000000000", "9223372036854775808"]
VALUES += ["true", "null", "[]", "[1, 2]", "{a: 1}", "word", "''", "2026-01-01", "../x", "é", "a/b:c"]
#: What a value makes is outside the test's folder, or takes a program that is not there: torchrun, a cluster, a device.
LEFT_OUT = {"config", "print_config", "model", "data", "ckpt_path", "weights_only"}
SECTIONS = ["seed_everything", "trainer", "router_timing", "expert_load", "exchange_timing", "throughput", "trace"]
SECTIONS += ["checkpoint", "onnx_export", "progress_bar", "model_summary", "run_summary"]


class _FitParser(MoECLI):
    """Only as far as the parser."""

    @staticmethod
    def subcommands():
        return {"fit": MoECLI.subcommands()["fit"]}

    def parse_arguments(self, parser, args):
        raise _Parser(parser)


class _Parser(BaseException):
    def __init__(self, parser: LightningArgumentParser):
        self.parser = parser


def fields(parser: LightningArgumentParser) -> list[str]:
    """Every flag of `fit`, but groups of others."""

    def leaves(namespace: Namespace, prefix: str = ""):
        for key, value in vars(namespace).items():
            if isinstance(value, Namespace):
                yield from leaves(value, f"{prefix}{key}.")
            else:
                yield prefix + key

    fit = parser._subcommands_action._name_parser_map["fit"]
    return [field for field in leaves(fit.get_defaults()) if field.split(".")[0] not in LEFT_OUT]


@pytest.fixture(scope="module")
def all_fields():
    with pytest.raises(_Parser) as stop:
        _FitParser(args=["fit", *TINY])
    return fields(stop.value.parser)


def test_every_section_is_fuzzed(all_fields):
    assert {field.split(".")[0] for field in all_fields} == set(SECTIONS)


@pytest.mark.parametrize("section", SECTIONS)
def test_any_value_is_taken_or_refused_in_one_line(folder, capsys, monkeypatch, all_fields, section):
    monkeypatch.setattr("lightning.Trainer.fit", lambda *args, **kwargs: None)
    choose = random.Random(section)
    wrong = []
    for field in all_fields:
        if field.split(".")[0] != section:
            continue
        value = choose.choice(VALUES)
        capsys.readouterr()
        try:
            with plain_errors():
                run_cli("fit", f"--{field}={value}")
        except SystemExit as stop:
            said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
            if stop.code != 2 or len(said) != 1:
                wrong.append(f"{field}={value}: exit {stop.code}, {said}")
        except BaseException as error:
            wrong.append(f"{field}={value}: {type(error).__name__} {' '.join(str(error).split())[:200]}")
    assert wrong == []
