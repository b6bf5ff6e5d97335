"""Configurations that are small on the disk and endless in memory."""

import pytest
from jsonargparse._loaders_dumpers import get_loader
from tiny_run import DATA, TRAINER, error_line

from moe_lightning.training.config import bounded

#: 9^9 values in 10 lines, by lists, by mappings and by merged mappings.
LISTS = "a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 9)
)
MAPPINGS = "a0: &a0 {x: 1}\n" + "".join(
    f"a{i}: &a{i} {{{', '.join(f'{key}: *a{i - 1}' for key in 'abcdefghi')}}}\n" for i in range(1, 9)
)
MERGED = "a0: &a0 {x: 1}\n" + "".join(f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}\n" for i in range(1, 9))
ENDLESS = {"lists": LISTS, "mappings": MAPPINGS, "merged": MERGED, "itself": "a: &a [*a]\n"}


@pytest.mark.parametrize("content", ENDLESS.values(), ids=ENDLESS)
@pytest.mark.parametrize("flag", ["--config=run.yaml", "--config={content}", "--trainer.logger={content}"])
def test_aliases_without_end_are_refused_in_one_line_before_they_are_expanded(folder, capsys, content, flag):
    (folder / "run.yaml").write_text(content)
    line = error_line(capsys, "fit", flag.format(content=content), tiny=[*DATA, *TRAINER])
    assert line.endswith("config: YAML must have at most 100000 values, got more, aliases (*name) counted; write less")


CHAIN = "a0: &a0 [1]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}]\n" for i in range(1, 200))


@pytest.mark.parametrize("content", ["a: " + "[" * 100_000, "{a: " * 100_000, "- " * 100_000, CHAIN], ids=range(4))
def test_nesting_without_end_is_refused_in_one_line(folder, capsys, content):
    """libyaml's tree is made by recursion, to a segmentation fault."""
    (folder / "run.yaml").write_text(content)
    line = error_line(capsys, "fit", "--config=run.yaml", tiny=[*DATA, *TRAINER])
    assert line == "config: YAML must have at most 100 levels, got more; nest less deeply"


def test_usual_aliases_are_read():
    load = bounded(get_loader("yaml"))
    assert load("a: &a {x: 1}\nb: {<<: *a, y: [*a, *a]}") == {"a": {"x": 1}, "b": {"x": 1, "y": [{"x": 1}, {"x": 1}]}}
    assert load("text & more * than that") == "text & more * than that"
    assert load("[" * 99 + "]" * 99)[0][0]
    assert len(load("[" + "&a [1], " + "*a, " * 40_000 + "]")) == 40_001
