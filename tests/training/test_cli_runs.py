"""The four commands from end to end, and the flags that Lightning users expect."""

import os
import shutil
import signal
from contextlib import nullcontext
from functools import cache

import pytest
import torch
import yaml
from tiny_run import DATA, MODEL, ROOT, TINY, TRAINER, first_router, run_cli

from moe_lightning.callbacks.base import moe_layers
from moe_lightning.data import TextDataModule
from moe_lightning.layers.low_precision import LowPrecisionWeights
from moe_lightning.models import decoder
from moe_lightning.routers import ROUTERS
from moe_lightning.training import language_module
from moe_lightning.training.cli import default_precision
from moe_lightning.training.config import MODELS
from moe_lightning.training.language_module import LanguageModule
from moe_lightning.utils.checkpoint_file import load_checkpoint
from moe_lightning.utils.errors import plain_errors

FAST = "--trainer.fast_dev_run=true"
SENTENCE = "the quick brown fox jumps over the lazy dog. "


def test_fit_validates_saves_and_logs(folder, losses):
    cli = run_cli("fit", "--trainer.max_steps=6", "--trainer.val_check_interval=3", "--checkpoint.dirpath=saved")
    assert len(losses) == cli.trainer.global_step == 6
    assert float(cli.trainer.callback_metrics["val/perplexity"]) == pytest.approx(
        float(cli.trainer.callback_metrics["val/loss"].exp())
    )
    best = cli.trainer.checkpoint_callback.best_model_path
    assert load_checkpoint(best)["global_step"] in (3, 6)
    assert load_checkpoint("saved/last.ckpt")["global_step"] == 6
    assert not list(folder.glob("**/*.tmp"))


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_ctrl_c_and_sigterm_before_the_first_validation_leave_a_checkpoint_and_a_table(
    folder, losses, monkeypatch, capsys, caplog, number, status
):
    step = LanguageModule.training_step

    def stopping(self, *arguments):
        if self.global_step == 2:
            os.kill(os.getpid(), number)
        return step(self, *arguments)

    monkeypatch.setattr(LanguageModule, "training_step", stopping)
    with pytest.raises(SystemExit) as stop, plain_errors():
        run_cli("fit", "--checkpoint.dirpath=saved")
    assert stop.value.code == status
    assert [path.name for path in (folder / "saved").iterdir()] == ["last.ckpt"]
    assert load_checkpoint("saved/last.ckpt")["global_step"] == len(losses) == 3
    assert "training with validation, s" in capsys.readouterr().out
    assert f"{number.name}: stopped after step 3; go on with --ckpt_path saved/last.ckpt" in caplog.text


def test_ctrl_c_before_training_is_130(folder, monkeypatch):
    monkeypatch.setattr(TextDataModule, "setup", lambda *arguments, stage: os.kill(os.getpid(), signal.SIGINT))
    # A shell's background job ignores it, and Lightning does from then on.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    with pytest.raises(SystemExit) as stop, plain_errors():
        run_cli("fit")
    assert stop.value.code == 130
    signal.signal(signal.SIGINT, before)


def test_validate_and_test_without_a_checkpoint(folder):
    for command, stage in (("validate", "val"), ("test", "test")):
        metrics = run_cli(command).trainer.callback_metrics
        assert 5 < float(metrics[f"{stage}/loss"]) < 6.5


def test_fast_dev_run_takes_one_step_and_writes_no_checkpoint(folder, losses):
    run_cli("fit", FAST)
    assert len(losses) == 1
    assert not list(folder.glob("**/*.ckpt"))


@pytest.mark.parametrize("flag", ["enable_progress_bar", "enable_checkpointing", "enable_model_summary"])
def test_lightning_switches_work(folder, losses, flag):
    cli = run_cli(
        "fit", f"--trainer.{flag}=false", "--trainer.max_steps=1", tiny=[*MODEL, *DATA, "--trainer.accelerator=cpu"]
    )
    assert len(losses) == 1
    assert flag != "enable_checkpointing" or not list(folder.glob("**/*.ckpt"))
    assert cli.trainer.global_step == 1


def test_overfit_batches_lowers_the_loss(folder, losses):
    options = ["--trainer.overfit_batches=2", "--trainer.max_steps=60", "--trainer.limit_val_batches=0"]
    run_cli("fit", *options, "--model.optimizer.learning_rate=1e-2", "--model.optimizer.warmup_steps=1")
    assert len(losses) == 60
    assert sum(losses[-2:]) / 2 < sum(losses[:2]) / 2 - 2.5
    assert losses[:2] != losses[2:4]


@pytest.mark.parametrize(
    ("accelerator", "gpu", "bf16", "precision"),
    [
        ("auto", True, True, "bf16-mixed"),
        ("gpu", True, True, "bf16-mixed"),
        ("auto", True, False, "32-true"),
        ("auto", False, True, "32-true"),
        ("cpu", True, True, "32-true"),
    ],
)
def test_default_precision(accelerator, gpu, bf16, precision, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: bf16)
    assert default_precision(accelerator) == precision


@pytest.mark.gpu
def test_a_gpu_run_takes_bf16_and_our_expert_kernels_by_itself(folder, capsys):
    cli = run_cli("fit", "--trainer.accelerator=auto", FAST)
    assert cli.trainer.precision == "bf16-mixed"
    experts = moe_layers(cli.model)[0].experts
    assert experts.implementation_for(torch.bfloat16, torch.device("cuda", 0)) == "cutlass"


def test_bf16_mixed_keeps_fp32_weights_and_logits(folder, losses, monkeypatch):
    seen = {}
    forward = torch.nn.Linear.forward

    def recording(self, x):
        y = forward(self, x)
        seen[self] = y.dtype
        return y

    monkeypatch.setattr(torch.nn.Linear, "forward", recording)
    cli = run_cli("fit", "--trainer.precision=bf16-mixed", FAST)
    assert 5 < losses[0] < 6.5
    assert {p.dtype for p in cli.model.parameters()} == {torch.float32}
    assert seen[cli.model.network.head] == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert cli.model.network(torch.zeros(1, 4, dtype=torch.long)).routings[0].logits_TE.dtype == torch.float32


def test_weights_are_cast_once_per_optimizer_step_and_the_losses_are_the_same(folder, losses, monkeypatch):
    refresh, refreshed = LowPrecisionWeights.refresh, []
    monkeypatch.setattr(LowPrecisionWeights, "refresh", lambda self: (refreshed.append(1), refresh(self)))
    flags = ["--trainer.precision=bf16-mixed", "--trainer.accumulate_grad_batches=3", "--trainer.max_steps=4"]
    flags += ["--trainer.limit_val_batches=0", "--trainer.enable_checkpointing=false"]
    run_cli("fit", *flags)
    assert (len(losses), len(refreshed)) == (12, 4)
    of_copies, losses[:] = list(losses), []
    monkeypatch.setattr(LowPrecisionWeights, "used", lambda self: nullcontext())
    run_cli("fit", *flags)
    assert losses == of_copies


@pytest.mark.parametrize("name", ["mlp", "decoder_moe"])
def test_compile_gives_the_same_losses(folder, losses, monkeypatch, name):
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    torch_compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda *args, **options: torch_compile(*args, **options, backend=backend))
    for module, made in ((decoder, "_compiled_attend"), (language_module, "compiled")):
        monkeypatch.setattr(module, made, cache(getattr(module, made).__wrapped__))
    torch._dynamo.reset()
    model = MODEL if name == "decoder_moe" else ["--model=mlp", "--model.d_model=16"]
    options = ["--trainer.max_steps=3", "--trainer.limit_val_batches=0", "--trainer.logger=false"]
    options.append("--trainer.enable_checkpointing=false")  # two runs in one folder
    for compile_flag in ("false", "true"):
        run_cli("fit", *options, f"--model.compile={compile_flag}", tiny=[*model, *DATA, *TRAINER])
        assert bool(compiled) == (compile_flag == "true")
    assert losses[3:] == pytest.approx(losses[:3], rel=1e-5)
    torch._dynamo.reset()


def test_print_config_loads_back(folder, parsed, capsys):
    flags = ["--model.router=sinkhorn", "--model.router.iterations=3", "--model.optimizer.learning_rate=0.5"]
    with pytest.raises(SystemExit) as stop:
        run_cli("fit", *flags, "--print_config")
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    (folder / "printed.yaml").write_text(printed)
    cli = parsed("--config=printed.yaml", tiny=[])
    assert first_router(cli).iterations == 3
    assert cli.model.optimizer_config.learning_rate == 0.5
    with pytest.raises(SystemExit):
        run_cli("fit", "--config=printed.yaml", "--print_config", tiny=[])
    assert capsys.readouterr().out == printed


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_configurations_parse(folder, parsed, path):
    written = yaml.safe_load(path.read_text())
    sizes = {"d_model": 16, "n_layers": 2, "n_heads": 2, "mlp_hidden_dim": 16}
    small = [f"--model.{name}={size}" for name, size in sizes.items() if name in written["model"]]
    routers = [None] if "router" not in written["model"] else ROUTERS if path.stem == "quickstart" else ["sinkhorn"]
    for router in routers:
        chosen = [f"--model.router={router}"] if router else []
        cli = parsed(f"--config={path}", *small, *chosen, tiny=["--trainer.accelerator=cpu"])
        assert type(cli.model) is MODELS[written["model"]["name"]]
        assert not router or type(first_router(cli)) is ROUTERS[router]
        assert cli.model.network.vocab_size == -(-written["data"].get("vocab_size", 257) // 64) * 64
        assert cli.model.optimizer_config.learning_rate == written["model"]["optimizer"]["learning_rate"]


@pytest.mark.parametrize("path", sorted((ROOT / "configs/debug").glob("*.yaml")), ids=lambda path: path.stem)
def test_debug_configurations_train(folder, losses, path):
    cli = run_cli("fit", f"--config={path}", "--trainer.max_steps=4", "--trainer.logger=false")
    assert cli.trainer.global_step == (2 if path.stem == "fast_dev_run" else 4)


def train(folder, *flags, tiny=TINY):
    (folder / "text.txt").write_text(SENTENCE * 100)
    save = ["--checkpoint.every_n_train_steps=80", "--checkpoint.monitor=null", "--checkpoint.dirpath=saved"]
    fit = ["--trainer.max_steps=80", "--trainer.limit_val_batches=0", "--trainer.logger=false"]
    optimizer = ["--model.optimizer.learning_rate=2e-2", "--model.optimizer.warmup_steps=5", "--data.batch_size=8"]
    run_cli("fit", *fit, *save, *optimizer, *flags, tiny=tiny)
    return "--ckpt_path=saved/last.ckpt"


@pytest.mark.parametrize("tokenizer", [["--data.tokenizer=bytes"], ["--data.tokenizer=bpe", "--data.vocab_size=280"]])
def test_predict_needs_the_checkpoint_alone(folder, capsys, tokenizer):
    checkpoint = train(folder, *tokenizer)
    (folder / "text.txt").unlink()
    shutil.rmtree(folder / "cache")
    capsys.readouterr()
    options = ["--model.temperature=0", "--model.max_new_tokens=40", "--data.prompt=the quick brown f"]
    run_cli("predict", checkpoint, *options, tiny=TRAINER)
    printed = " ".join(line.strip("│ ") for line in capsys.readouterr().out.splitlines())
    assert "the quick brown fox jumps over" in printed


def test_predict_continues_several_prompts(folder, capsys):
    checkpoint = train(folder)
    options = [
        "--data.prompt=the quick",
        "--data.prompt=fox jumps",
        "--model.temperature=0",
        "--model.max_new_tokens=5",
    ]
    run_cli("predict", checkpoint, *options, tiny=TRAINER)
    printed = capsys.readouterr().out
    assert "prompt 1" in printed
    assert "prompt 2" in printed
    assert "the quick brow" in printed
    assert "fox jumps over" in printed


@pytest.mark.parametrize(
    "stored", [["naive_topk"], ["sinkhorn", "--model.router.iterations=3"]], ids=["topk", "sinkhorn"]
)
def test_other_router_on_a_checkpoint_gives_the_same_perplexity(folder, stored):
    checkpoint = train(folder, f"--model.router={stored[0]}", *stored[1:])
    perplexities = []
    for router in ("naive_topk", "masked_matmul", "fused_select"):
        cli = run_cli("test", checkpoint, f"--model.router={router}", tiny=TRAINER)
        assert type(first_router(cli)) is ROUTERS[router]
        perplexities.append(float(cli.trainer.callback_metrics["test/perplexity"]))
    assert 1 < perplexities[0] < 50  # it has learnt something
    assert perplexities[1:] == pytest.approx([perplexities[0]] * 2, rel=1e-5)


def test_checkpoint_brings_its_model_and_flags_override_it(folder):
    checkpoint = train(folder, "--model.router=sinkhorn", "--model.router.iterations=3", "--model.dropout=0.1")
    cli = run_cli("test", checkpoint, tiny=TRAINER)
    assert first_router(cli).iterations == 3
    assert cli.model.network.blocks[0].attention.dropout == 0.1
    cli = run_cli("test", checkpoint, "--model.router.iterations=4", "--model.dropout=0.2", tiny=TRAINER)
    assert first_router(cli).iterations == 4
    assert cli.model.network.blocks[0].attention.dropout == 0.2


def test_seed_makes_a_run_repeatable(folder, losses):
    for seed in (1, 1, 2):
        run_cli("fit", f"--seed_everything={seed}", "--trainer.max_steps=3", "--trainer.limit_val_batches=0")
    assert losses[:3] == losses[3:6]
    assert losses[:3] != losses[6:]
