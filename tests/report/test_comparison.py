"""What is held against each other is of the same step, the same kind and the same work, or is not called better."""

import math
import re

import pytest
import torch
from torch.utils.tensorboard import SummaryWriter
from written_run import write_run

from moe_lightning.report.__main__ import main
from moe_lightning.report.compare import compare
from moe_lightning.report.read_run import disambiguate, read_run
from moe_lightning.report.summary import table


def drawn(*folders):
    runs = disambiguate([read_run(folder) for folder in folders])
    comparison = compare(runs)
    return table(runs, comparison), comparison


def column(found, head):
    """Texts, notes and which is bold, under the head that begins so."""
    [at] = [i for i, name in enumerate(found.heads) if re.fullmatch(head, name)]
    cells = [row.cells[at] for row in found.rows]
    return [cell.text for cell in cells], [cell.note for cell in cells], [cell.best for cell in cells]


def key(found, what):
    return [(one.value, one.unit, one.label) for one in found.highlights if one.what.startswith(what)]


@pytest.fixture
def unlike(tmp_path):
    """Runs of 400, 40 and 20 steps: the longest has the lowest loss, at the last common step the shortest has."""
    return [
        write_run(tmp_path / "a/version_0", "naive_topk", 400, {20: 5.5, 400: 2.5}, {20: 0.9, 400: 0.2}),
        write_run(tmp_path / "b/version_0", "sinkhorn", 40, {20: 5.25, 40: 4.0}, {20: 0.84, 40: 0.5}),
        write_run(tmp_path / "c/version_0", "fused_select", 20, {20: 5.125}, {20: 0.76}),
    ]


def test_runs_of_different_lengths_are_compared_at_the_last_step_they_have_in_common(unlike):
    found, comparison = drawn(*unlike)
    assert column(found, "steps") == (["400", "40", "20"], ["", "", ""], [False] * 3)
    assert column(found, "tokens")[0] == ["51,200", "5,120", "2,560"]
    last = column(found, "last validation loss")
    assert last == (["2.500", "4.000", "5.125"], ["step 400", "step 40", "step 20"], [False] * 3)
    assert column(found, "validation loss at step 20") == (["5.500", "5.250", "5.125"], [""] * 3, [False, False, True])
    assert column(found, "load CV, evaluation at step 20") == (["0.90", "0.84", "0.76"], [""] * 3, [False, False, True])
    assert key(found, "lowest validation loss") == [("5.125", "at step 20", "fused_select")]
    assert key(found, "most even load in evaluation") == [("0.76", "CV at step 20", "fused_select")]
    assert comparison.differences == "steps (400, 40, 20)"
    assert any("compared at step 20, the last at which all of them were validated" in note for note in found.notes)


def test_runs_of_one_length_are_compared_at_their_end(tmp_path):
    found, comparison = drawn(
        write_run(tmp_path / "a/version_0", "naive_topk", 40, {20: 5.5, 40: 4.0}),
        write_run(tmp_path / "b/version_0", "sinkhorn", 40, {20: 5.0, 40: 4.5}),
    )
    assert column(found, "validation loss") == (["4.000", "4.500"], ["", ""], [True, False])
    assert key(found, "lowest validation loss") == [("4.000", "", "naive_topk")]
    assert comparison.differences == ""


def test_a_last_validation_before_the_end_carries_its_step(tmp_path):
    found, _ = drawn(
        write_run(tmp_path / "a/version_0", "naive_topk", 45, {40: 4.0}),
        write_run(tmp_path / "b/version_0", "sinkhorn", 45, {40: 4.5}),
    )
    assert column(found, "validation loss")[1] == ["step 40", "step 40"]


def test_runs_without_a_common_step_are_not_compared(tmp_path):
    found, comparison = drawn(
        write_run(tmp_path / "a/version_0", "naive_topk", 400, {200: 3.0, 400: 2.5}),
        write_run(tmp_path / "b/version_0", "sinkhorn", 30, {30: 4.5}),
    )
    assert column(found, "validation loss") == (["2.500", "4.500"], ["", ""], [False, False])
    assert key(found, "lowest") == []
    assert "No two runs were validated at the same point of training" in comparison.not_losses
    assert comparison.not_losses in found.notes


def test_a_run_that_was_not_validated_there_has_no_figure_there(tmp_path):
    found, _ = drawn(
        write_run(tmp_path / "a/version_0", "naive_topk", 400, {400: 2.5}),
        write_run(tmp_path / "b/version_0", "sinkhorn", 40, {20: 5.0, 40: 4.5}),
        write_run(tmp_path / "c/version_0", "fused_select", 40, {20: 5.25, 40: 4.0}),
    )
    assert column(found, "validation loss at step 40")[0] == ["\N{EN DASH}", "4.500", "4.000"]
    assert any("2 of 3 of them" in note for note in found.notes)


def test_runs_of_unlike_batches_are_compared_at_equal_tokens_and_their_times_not(tmp_path):
    found, comparison = drawn(
        write_run(tmp_path / "a/version_0", "naive_topk", 40, {20: 5.5, 40: 4.0}, batch_size=4),
        write_run(tmp_path / "b/version_0", "sinkhorn", 40, {10: 5.25, 20: 4.25, 40: 3.0}, batch_size=8),
    )
    assert column(found, "validation loss at 5,120 tokens") == (["4.000", "4.250"], ["", ""], [True, False])
    assert key(found, "lowest validation loss") == [("4.000", "at 5,120 tokens", "naive_topk")]
    assert comparison.not_times == (
        "Times and tokens/s are not compared: the runs differ in tokens per micro-batch (128, 256)."
    )
    assert key(found, "cheapest routing") == []
    assert column(found, "T_route, ms")[2] == [False, False]


@pytest.mark.parametrize(
    ("other", "says"), [({"data": "other.txt"}, "data.path"), ({"machine": "another CPU"}, "machine")]
)
def test_another_text_or_machine_is_not_compared(tmp_path, other, says):
    found, comparison = drawn(
        write_run(tmp_path / "a/version_0", "naive_topk", 20, {20: 5.5}),
        write_run(tmp_path / "b/version_0", "sinkhorn", 20, {20: 5.0}, **other),
    )
    reason = comparison.not_losses if says == "data.path" else comparison.not_times
    assert says in reason
    assert reason in found.notes
    assert bool(key(found, "lowest validation loss")) == (says != "data.path")
    assert bool(key(found, "cheapest routing")) == (says != "machine")


def test_the_most_even_load_is_that_of_evaluation(tmp_path):
    even, uneven = {20: [[10, 10, 10, 10]]}, {20: [[40, 0, 0, 0]]}
    found, _ = drawn(
        write_run(tmp_path / "a/version_0", "naive_topk", 20, {20: 5.0}, {20: 0.76}, uneven),
        write_run(tmp_path / "b/version_0", "sinkhorn", 20, {20: 5.0}, {20: 0.84}, even),
    )
    assert column(found, "load CV, evaluation") == (["0.76", "0.84"], ["", ""], [True, False])
    assert key(found, "most even load in evaluation") == [("0.76", "CV", "naive_topk")]


def test_load_in_training_is_named_so_and_of_equally_many_steps(tmp_path):
    early, late = [[40, 0, 0, 0], [20, 20, 0, 0]], [[0, 200, 0, 0], [0, 0, 100, 100]]
    found, _ = drawn(
        write_run(tmp_path / "a/version_0", "naive_topk", 40, {20: 5.0, 40: 4.0}, counts={20: early, 40: late}),
        write_run(tmp_path / "b/version_0", "sinkhorn", 20, {20: 5.0}, counts={20: [[15, 5, 10, 10]] * 2}),
    )
    # Of 40, 0, 0, 0: sqrt(3); of 20, 20, 0, 0: 1. The mean of both layers, without what came after step 20.
    assert column(found, "load CV, training at step 20")[0] == [
        f"{(math.sqrt(3) + 1) / 2:.2f}",
        f"{math.sqrt(1 / 8):.2f}",
    ]
    assert column(found, "load max/mean, training at step 20")[0] == ["3.00", "1.50"]
    assert key(found, "most even load in training") == [("0.35", "CV at step 20", "sinkhorn")]


def test_load_in_training_is_not_held_against_load_in_evaluation(tmp_path):
    found, _ = drawn(
        write_run(tmp_path / "a/version_0", "naive_topk", 20, {20: 5.0}, {20: 0.76}),
        write_run(tmp_path / "b/version_0", "sinkhorn", 20, {20: 5.0}, counts={20: [[10, 10, 10, 10]]}),
        write_run(tmp_path / "c/version_0", "fused_select", 20, {20: 5.0}, {20: 0.8}),
    )
    texts, notes, best = column(found, "load CV")
    assert (texts, notes) == (["0.76", "0.00", "0.80"], ["evaluation", "training", "evaluation"])
    assert best == [True, False, False]


def test_times_of_a_run_that_goes_on_are_not_held_against_those_of_whole_runs(tmp_path):
    folders = [
        write_run(tmp_path / "a/version_0", "naive_topk", 20, summary={"step_ms": 10.0}),
        write_run(tmp_path / "b/version_0", "sinkhorn", 20, summary={"step_ms": 12.0}),
        write_run(tmp_path / "c/version_0", "fused_select", 20),
    ]
    (folders[2] / "summary.json").unlink()
    with SummaryWriter(str(folders[2])) as writer:
        writer.add_scalar("router_time/step_ms", 5.0, 19)
    found, _ = drawn(*folders)
    assert column(found, "step, ms") == (["10.0", "12.0", "5.00"], ["", "", "as logged"], [True, False, False])


@pytest.mark.parametrize(
    "tags", [{"T_route": 3.0}, {"forward/T_route": 1.0, "backward/T_route": 2.0}], ids=["together", "apart"]
)
def test_times_logged_together_or_by_direction_are_the_same_sum(tmp_path, tags):
    folder = write_run(tmp_path / "a/version_0", "naive_topk", 20)
    (folder / "summary.json").unlink()
    with SummaryWriter(str(folder)) as writer:
        for tag, value in tags.items():
            writer.add_scalar(f"router_time/{tag}_ms", value, 19)
    assert read_run(folder).time_ms("T_route") == 3.0


def test_a_loss_that_came_to_nan_is_shown_and_never_the_best(tmp_path):
    found, _ = drawn(
        write_run(tmp_path / "a/version_0", "naive_topk", 20, {10: 1.0, 20: math.nan}),
        write_run(tmp_path / "b/version_0", "sinkhorn", 20, {10: 5.0, 20: 4.0}),
        write_run(tmp_path / "c/version_0", "fused_select", 20, {10: 5.0, 20: 4.5}),
    )
    assert column(found, "validation loss") == (["NaN", "4.000", "4.500"], [""] * 3, [False, True, False])


def test_a_checkpoint_carries_its_own_step_and_loss(tmp_path):
    folder = write_run(tmp_path / "a/version_0", "naive_topk", 40, {20: 4.5, 40: 5.0})
    (folder / "checkpoints").mkdir()
    torch.save({"global_step": 30, "state_dict": {}}, folder / "checkpoints/last.ckpt")
    found, _ = drawn(folder)
    assert found.rows[0].checkpoint_note == "step 30, not validated there"
    (folder / "checkpoints/step=20-val_loss=4.500.ckpt").write_bytes(b"")
    found, _ = drawn(folder)
    assert column(found, "validation loss")[0] == ["5.000"]
    assert found.rows[0].checkpoint_note == "step 20, validation loss 4.500"


def test_the_page_says_all_of_it(unlike, tmp_path):
    main([*map(str, unlike), "--out", str(tmp_path / "page.html")])
    page = (tmp_path / "page.html").read_text()
    assert "The runs differ in steps (400, 40, 20)." in page
    assert "<th>validation loss at step 20</th>" in page
    assert "9.00 at 400" in page  # labels at the ends of lines that end at different steps
    assert "9.00 at 20" in page
