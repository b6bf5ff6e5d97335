"""Two ranks, experts spread over them, and something that goes wrong: neither waits for ever, the checkpoint is whole.

Catalogue rows 34, 36 to 38, 42, 44 to 48 under two processes.
"""

import json
from pathlib import Path

import pytest
import torch
from scripts import run_forked

from moe_lightning.utils.checkpoint_file import load_checkpoint

pytestmark = pytest.mark.slow


class Run:
    """What a run's ranks ended with, said and saved."""

    def __init__(self, folder: Path, statuses: list[int]) -> None:
        self.statuses = statuses
        self.logs = [(folder / f"log-{rank}").read_text() for rank in range(len(statuses))]
        self.saved = {path.name: load_checkpoint(path) for path in (folder / "saved").glob("*.ckpt")}
        self.leftovers = list(folder.glob("saved/.*.tmp"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("faults")


@pytest.fixture(scope="module")
def runs(folder):
    """All of them, by name; one start of Python."""
    done = run_forked(folder, str(Path(__file__).with_name("ep_faults.py")), str(folder), seconds=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return {name: Run(folder / name, statuses) for name, statuses in json.loads(done.stdout).items()}


def assert_whole(checkpoint, steps):
    """Of all four experts, with the optimizer's state of each."""
    assert checkpoint["global_step"] == steps
    experts = [value for name, value in checkpoint["state_dict"].items() if ".experts." in name]
    assert [value.shape[0] for value in experts] == [4] * 4  # two layers, up and down
    states = checkpoint["optimizer_states"][0]["state"].values()
    assert {int(state["step"]) for state in states} == {steps}
    assert sum(state["exp_avg"].shape[0] == 4 and state["exp_avg"].dim() == 3 for state in states) == 4


@pytest.mark.parametrize(
    ("name", "operation"),
    [("skipped_layer", "dispatch/counts"), ("skipped_layer_symmetric", "a barrier of dispatch=symmetric")],
)
def test_a_layer_that_a_rank_skips_ends_the_others_with_its_name(name, operation, runs):
    run = runs[name]
    assert all(status not in (0, 143) for status in run.statuses)
    assert "Timed out waiting" in run.logs[0]
    assert run.logs[0].splitlines()[-1].startswith(f"collective: every rank of a group must come to {operation}, got")


def test_a_metric_of_one_rank_is_its_own(runs):
    run = runs["metric_of_one_rank"]
    assert run.statuses == [0, 0]
    assert "steps 6 False" in run.logs[0]
    assert "steps 6 True" in run.logs[1]


def test_a_metric_of_one_rank_that_is_to_be_reduced_ends_all_in_words(runs):
    run = runs["synced_metric_of_one_rank"]
    assert 0 not in run.statuses
    assert (
        run.logs[1].splitlines()[-1].startswith("strategy: every rank must log the same metrics where sync_dist=True")
    )


@pytest.mark.parametrize(
    ("name", "step"),
    [("sigterm_while_rows_travel", None), ("sigterm_while_saving", 4), ("sigterm_while_validating", 3)],
)
def test_sigterm_to_a_rank_that_waits_for_the_other(name, step, runs):
    run = runs[name]
    assert run.statuses == [143, 143], run.logs
    stopped = run.saved["last.ckpt"]
    assert step in (None, stopped["global_step"])
    assert_whole(stopped, stopped["global_step"])
    if step == 4:
        assert_whole(run.saved["step=2.ckpt"], 2)  # what was being saved
    assert sum(log.count("SIGTERM: stopped after step") for log in run.logs) == 1


def test_a_disk_that_is_full_once_is_told_by_rank_zero_and_both_go_on(runs):
    run = runs["full_disk"]
    assert run.statuses == [0, 0], run.logs
    assert ["last.ckpt must fit on the disk" in log for log in run.logs] == [True, False]
    assert run.saved.keys() == {"step=2.ckpt", "step=4.ckpt", "step=6.ckpt", "last.ckpt"}
    assert_whole(run.saved["last.ckpt"], 6)
    assert_whole(run.saved["step=4.ckpt"], 4)
    assert not run.leftovers


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("damaged_checkpoint", "its SHA-256 differs from the one written with it"),
        ("other_weights", "strategy: every rank must start from the same weights"),
        ("five_experts", "num_experts must be a multiple of the ranks that share them, got num_experts=5, ranks=2"),
    ],
)
def test_refused_on_both_ranks_in_one_line(name, said, runs):
    run = runs[name]
    assert run.statuses == [2, 2]
    for log in run.logs:
        [line] = [line for line in log.splitlines() if line.startswith("error: ")]
        assert said in line
        assert "Traceback" not in log


def test_ranks_of_other_settings_are_refused_by_the_names_that_differ(runs):
    run = runs["other_settings"]
    assert run.statuses == [2, 2]
    for log in run.logs:
        assert [line for line in log.splitlines() if line.startswith("error: ")] == [
            "error: strategy: all ranks must be started with the same settings, got on rank 0 and rank 1 "
            "trainer.max_epochs=1 and 2, data.batch_size=2 and 3; give all of them the same flags, files and seed"
        ]
        assert "Traceback" not in log


def test_the_exit_of_one_rank_alone_ends_all_and_it_gives_up_its_communicators(runs):
    run = runs["exit_of_one_rank"]
    assert run.statuses[1] == 7
    assert run.statuses[0] == 2
    # It has not waited for its time-out, and leaves the reason to the one that ended.
    assert run.logs[0].splitlines()[-1] == (
        "error: ranks: all must go on to the end, got 'Connection closed by peer' from another; what that one printed "
        "says why it ended"
    )
    assert "Traceback" not in run.logs[0]
    assert run.logs[1].count("left the others") == 1
    assert all("left the others" not in log for log in runs["lost_agent"].logs)  # they stop together


def test_ranks_whose_agent_is_killed_stop_with_a_checkpoint(runs):
    run = runs["lost_agent"]
    assert run.statuses == [143, 143], run.logs
    assert run.saved["last.ckpt"]["global_step"] >= 3
    assert sum(log.count("SIGTERM: stopped after step") for log in run.logs) == 1
    assert all("is gone, which started this rank: the rank ends" in log for log in run.logs)


def test_a_step_has_a_timeout_of_its_own_from_the_second_on(runs):
    """Of all ranks, of those that share experts, of a barrier, of a kernel."""
    run = runs["timeouts"]
    assert run.statuses == [0, 0], run.logs
    for log in run.logs:
        seen = [line for line in log.splitlines() if line.startswith("timeouts")]
        assert seen == ["timeouts 42 42 43 42", "timeouts 41 41 43 41", "timeouts 41 41 43 41"]
        assert {line for line in log.splitlines() if line.startswith("barrier")} == {"barrier 43"}


def test_ranks_wait_in_a_barrier_for_one_that_works_alone_for_longer_than_a_collective_may_take(runs):
    run = runs["timeouts"]
    assert run.statuses == [0, 0], run.logs
    assert all(log.splitlines()[-1] == "met" for log in run.logs)


def assert_same_bits(a, b):
    assert a["state_dict"].keys() == b["state_dict"].keys()
    for name, value in a["state_dict"].items():
        assert value.equal(b["state_dict"][name]), name
    ours, theirs = ([state["state"] for state in c["optimizer_states"]] for c in (a, b))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_initial_weights_are_those_of_one_rank(runs, folder):
    assert runs["start-two"].statuses + runs["start-one"].statuses == [0, 0, 0]
    assert_same_bits(*(load_checkpoint(folder / f"{name}.ckpt") for name in ("start-two", "start-one")))


def test_from_two_ranks_to_one_and_back_not_a_bit_changes(runs, folder):
    assert [runs[name].statuses for name in ("two", "one", "again")] == [[0, 0], [0], [0, 0]]
    two, one, again = (load_checkpoint(folder / f"{name}.ckpt") for name in ("two", "one", "again"))
    assert_whole(two, 4)
    assert not two["state_dict"]["network.blocks.0.feed_forward.experts.up"].equal(
        load_checkpoint(folder / "start-two.ckpt")["state_dict"]["network.blocks.0.feed_forward.experts.up"]
    )
    assert_same_bits(two, one)
    assert_same_bits(one, again)


def test_killed_while_two_ranks_save(tmp_path):
    """Twenty SIGKILLs of either rank at random moments: what is at the path is of one step, and goes forward."""
    done = run_forked(tmp_path, str(Path(__file__).with_name("save_on_two_ranks_until_killed.py")), str(tmp_path))
    assert done.returncode == 0, done.stderr + "".join(log.read_text() for log in tmp_path.glob("log-*"))[-3000:]
    report = json.loads(done.stdout)
    assert len(report["steps"]) == 20
    assert report["steps"] == sorted(report["steps"])
    assert report["steps"][-1] > report["steps"][0]
    assert report["leftovers"] >= 1  # some kills did hit the writing
    assert report["killed"][0] * report["killed"][1] > 0
    assert report["files_after_one_more_save"] == ["killed.ckpt"]
