"""What a run prints at its end, and what predict shows."""

import json
import os
import re
from pathlib import Path

import pytest
import torch
from tiny_run import run_cli

from moe_lightning.callbacks import GenerationPrinter
from moe_lightning.layers import experts


def summary(capsys, *flags):
    capsys.readouterr()
    cli = run_cli("fit", "--trainer.max_steps=6", "--trainer.log_every_n_steps=2", *flags)
    return capsys.readouterr().out, cli


def number_behind(name, printed):
    found = re.search(rf"{re.escape(name)}\s*│\s*([\d.,]+)", printed)
    assert found, f"no line with {name!r}"
    return float(found[1].replace(",", ""))


def row(name, printed):
    """The cells of a line of a table, percent or not; None where one is empty."""
    found = re.search(rf"{re.escape(name)}\s*│(.*)│\n", printed)
    assert found, f"no line with {name!r}"
    return [float(cell.strip(" %").replace(",", "")) if cell.strip() else None for cell in found[1].split("│")]


def test_every_line_is_there(folder, capsys):
    printed, cli = summary(capsys, "--trainer.val_check_interval=3", "--model.router=naive_topk")
    metrics = cli.trainer.callback_metrics
    assert number_behind("val/perplexity", printed) == pytest.approx(float(metrics["val/perplexity"]), abs=1e-3)
    assert number_behind("val/loss", printed) == pytest.approx(float(metrics["val/loss"]), abs=1e-3)
    assert number_behind("tokens/s per rank", printed) > 0
    assert "router time: naive_topk" in printed
    assert re.search(r"experts by\s*│\s*grouped_mm", printed)
    names = ("T_logit", "T_select", "T_index", "T_permute", "T_pack", "T_route", "T_experts", "T_unpack")
    forward = {name: row(name, printed)[0] for name in names}
    backward = {name: row(name, printed)[1] for name in names}
    together = {name: row(name, printed)[2] for name in (*names, "step")}
    assert forward["T_pack"] == pytest.approx(forward["T_index"] + forward["T_permute"], abs=0.016)
    for times in (forward, backward, together):
        assert times["T_route"] == pytest.approx(times["T_logit"] + times["T_select"] + times["T_pack"], abs=0.021)
    assert [backward["T_index"], backward["T_permute"], together["T_index"]] == [None] * 3
    assert together["T_experts"] == pytest.approx(forward["T_experts"] + backward["T_experts"], abs=0.011)
    assert together["step"] > together["T_route"]
    assert row("T_route", printed)[3] == pytest.approx(100 * together["T_route"] / together["step"], abs=0.5)
    assert 1 <= number_behind("max/mean", printed) <= 4
    assert 0 <= number_behind("CV", printed) <= 2
    checkpoint = re.search(r"^checkpoint:  (.*)$", printed, re.MULTILINE)[1]
    assert (folder / checkpoint).is_file()
    directory = re.search(r"^look at it:  tensorboard --logdir (\S+) --host 127.0.0.1$", printed, re.MULTILINE)[1]
    assert list((folder / directory).glob("events.out.tfevents.*"))


@pytest.mark.parametrize("order", [("CSVLogger", "TensorBoardLogger"), ("TensorBoardLogger", "CSVLogger")])
def test_run_card_configuration_and_hint_are_with_the_event_files_whatever_the_order_of_loggers(folder, capsys, order):
    loggers = ", ".join(f"{{class_path: {kind}, init_args: {{save_dir: {kind}}}}}" for kind in order)
    printed, _ = summary(capsys, f"--trainer.logger=[{loggers}]", "--trainer.limit_val_batches=0")
    events = folder / "TensorBoardLogger/lightning_logs/version_0"
    assert list(events.glob("events.out.tfevents.*"))
    assert {path.name for path in events.iterdir()} >= {"run.json", "summary.json", "config.yaml", "hparams.yaml"}
    assert f"tensorboard --logdir {events.relative_to(folder)} " in printed


def test_without_tensorboard_the_hint_is_the_folder_of_the_logs(folder, capsys):
    printed, cli = summary(
        capsys, "--trainer.logger={class_path: CSVLogger, init_args: {save_dir: csv}}", "--trainer.limit_val_batches=0"
    )
    assert "tensorboard" not in printed
    assert f"logs:        {os.path.relpath(cli.trainer.log_dir)}\n" in printed


def test_summary_json_holds_the_printed_figures(folder, capsys):
    printed, cli = summary(capsys, "--trainer.val_check_interval=3", "--model.router=sinkhorn")
    kept = json.loads((Path(cli.trainer.log_dir) / "summary.json").read_text())
    assert (kept["router"], kept["steps"]) == ("sinkhorn", 6)
    assert kept["metrics"]["val/perplexity"] == float(cli.trainer.callback_metrics["val/perplexity"])
    assert kept["route_share"] == pytest.approx(kept["times_ms"]["T_route"] / kept["step_ms"])
    assert number_behind("max/mean", printed) == pytest.approx(sum(kept["max_over_mean_L"]) / 2, abs=1e-3)
    assert row("T_route", printed)[2] == pytest.approx(kept["times_ms"]["T_route"], abs=0.01)
    assert kept["times_ms"]["T_pack"] == kept["forward_ms"]["T_pack"] + kept["backward_ms"]["T_pack"]
    assert kept["forward_ms"]["T_pack"] == pytest.approx(
        kept["forward_ms"]["T_index"] + kept["forward_ms"]["T_permute"]
    )
    assert kept["times_ms"]["T_index"] == kept["forward_ms"]["T_index"]
    assert "T_index" not in kept["backward_ms"]
    assert kept["exchange"] == {}
    assert (folder / kept["checkpoint"]).is_file()
    card = json.loads((Path(cli.trainer.log_dir) / "run.json").read_text())
    sizes = {name: p.numel() for name, p in cli.model.named_parameters()}
    experts = sum(size for name, size in sizes.items() if "experts" in name)
    assert card["parameters"] == sum(sizes.values())
    assert card["active_parameters"] == sum(sizes.values()) - experts // 2  # 2 of 4 experts
    assert (card["ranks"], card["machine"]["cores"]) == (1, os.cpu_count())
    assert {"date", "command", "commit", "versions"} <= card.keys()


def test_a_model_with_one_layer_and_a_dense_one(folder, capsys):
    printed, _ = summary(capsys, "--model.n_layers=1")
    assert number_behind("max/mean", printed) >= 1
    printed, _ = summary(capsys, "--model=mlp", "--model.d_model=16")
    assert "tokens/s per rank" in printed
    assert "T_route" not in printed


def test_no_step_takes_no_time(folder, capsys):
    printed, cli = summary(capsys, "--trainer.max_steps=0")
    assert number_behind("training with validation, s", printed) == 0
    kept = json.loads((Path(cli.trainer.log_dir) / "summary.json").read_text())
    assert (kept["steps"], kept["seconds"], kept["tokens_per_second"], kept["step_ms"]) == (0, 0, None, None)


@pytest.mark.parametrize(("router", "by"), [("masked_matmul", "bmm"), ("fused_select", "grouped_mm")])
def test_experts_by_names_what_runs(folder, capsys, router, by, monkeypatch):
    called = set()
    for module, attribute, name in ((torch, "bmm", "bmm"), (experts, "_eager_grouped_mm", "grouped_mm")):
        real = getattr(module, attribute)
        record = lambda *a, real=real, name=name, **k: (called.add(name), real(*a, **k))[1]  # noqa: E731
        monkeypatch.setattr(module, attribute, record)
    printed, _ = summary(capsys, f"--model.router={router}")
    assert called == {by}
    assert re.search(rf"experts by\s*│\s*{by} ", printed)


def test_fast_dev_run_writes_no_summary(folder, capsys):
    summary(capsys, "--trainer.fast_dev_run=true")
    assert not list(folder.glob("**/summary.json")) + list(folder.glob("**/run.json"))


def test_without_validation_checkpoint_or_logger(folder, capsys):
    printed, _ = summary(capsys, "--trainer.limit_val_batches=0", "--trainer.logger=false")
    assert "val/perplexity" not in printed
    assert "tensorboard" not in printed
    assert "T_route" in printed


def test_run_summary_off(folder, capsys):
    printed, _ = summary(capsys, "--run_summary.enabled=false")
    assert "T_route" not in printed
    assert "tensorboard --logdir" not in printed


def test_timing_and_load_off(folder, capsys):
    printed, _ = summary(
        capsys, "--router_timing.enabled=false", "--expert_load.enabled=false", "--throughput.enabled=false"
    )
    assert "T_route" not in printed
    assert "max/mean" not in printed
    assert "tokens/s" not in printed


class FakeTrainer:
    def __init__(self, is_global_zero=True):
        self.is_global_zero = is_global_zero
        self.datamodule = self

    @staticmethod
    def decode(ids):
        return bytes(ids.tolist()).decode()


def ids(text):
    return torch.tensor(list(text.encode()))


def test_generation_is_printed_as_text_on_rank_zero(capsys):
    batch, outputs = ids("[bold]def ")[None], ids("[bold]def f(x): [/x]")[None]
    GenerationPrinter().on_predict_batch_end(FakeTrainer(), None, outputs, batch, 2)
    printed = capsys.readouterr().out
    assert "[bold]def f(x): [/x]" in printed  # brackets of the text are no markup
    assert "prompt 3" in printed
    alone = FakeTrainer()
    alone.datamodule = None  # dataloaders of one's own
    GenerationPrinter().on_predict_batch_end(alone, None, torch.tensor([[7, 8, 9, 10]]), torch.tensor([[7, 8]]), 0)
    assert "│ 7 8 9 10 " in capsys.readouterr().out
    GenerationPrinter().on_predict_batch_end(FakeTrainer(is_global_zero=False), None, outputs, batch, 2)
    assert capsys.readouterr().out == ""
