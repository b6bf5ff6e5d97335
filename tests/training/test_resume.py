"""What a command with a checkpoint takes from it, from flags and from files; what it says, and what it refuses."""

import shutil

import pytest
import yaml
from test_hyperparameters import as_before
from tiny_run import DATA, MODEL, ROOT, TINY, TRAINER, error_line, first_router, run_cli, text

from moe_lightning.routers import ROUTERS
from moe_lightning.training import optimizer, resume
from moe_lightning.training.cli import MoECLI

LAST = "--ckpt_path=saved/last.ckpt"
QUIET = ["--trainer.limit_val_batches=0", "--trainer.logger=false", "--run_summary.enabled=false"]
QUIET += ["--onnx_export.enabled=false", "--trainer.enable_model_summary=false", *TRAINER]
SAVE = ["--checkpoint.every_n_train_steps=4", "--checkpoint.monitor=null", "--checkpoint.dirpath=saved"]
RUN = ["--model.router=sinkhorn", "--model.router.iterations=3", "--model.balance_coef=0.5", "--model.dropout=0.1"]
RUN += ["--model.optimizer.learning_rate=0.25", "--model.optimizer.warmup_steps=2", "--data.seed=5"]
README = [f"--config={ROOT}/configs/quickstart.yaml", LAST, *QUIET]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Folder of a run of four steps, to be copied."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "text.txt").write_text(text(4000))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run_cli("fit", *MODEL, *DATA, *RUN, *SAVE, *QUIET, "--trainer.max_steps=4", tiny=[])
    return folder


@pytest.fixture
def trained(folder, run):
    shutil.copytree(run, folder, dirs_exist_ok=True)
    return folder


@pytest.fixture
def said(monkeypatch) -> list[str]:
    lines: list[str] = []
    for module in (resume, optimizer):
        monkeypatch.setattr(module, "rank_zero_info", lines.append)
    return lines


@pytest.fixture
def resumed(trained, monkeypatch):
    """The command line up to the point where it would run."""
    monkeypatch.setattr(MoECLI, "_run_subcommand", lambda self, command: None)
    return lambda *flags, command="fit": run_cli(command, *flags, tiny=[])


def test_the_readmes_resume_keeps_router_losses_optimizer_and_data(resumed, said):
    cli = resumed(*README)
    assert type(first_router(cli)) is ROUTERS["sinkhorn"]
    assert first_router(cli).iterations == 3
    assert (cli.model.balance_coef, cli.model.network.blocks[0].attention.dropout) == (0.5, 0.1)
    assert (cli.model.optimizer_config.learning_rate, cli.model.optimizer_config.warmup_steps) == (0.25, 2)
    assert {name: cli.datamodule.hparams[name] for name in ("path", "seq_len", "batch_size", "seed")} == {
        "path": "text.txt",
        "seq_len": 16,
        "batch_size": 2,
        "seed": 5,
    }
    assert cli.trainer.max_steps == 400  # the trainer's settings are the command line's
    [line] = said
    for part in ("router sinkhorn (not fused_select)", "balance_coef 0.5 (not 0.01)", "learning_rate 0.25 (not 0.002)"):
        assert f".{part}" in line
    assert "z_coef" not in line  # the file says the same


def test_a_flag_that_differs_is_obeyed_and_said_once_with_old_and_new(resumed, said):
    same = "--model.z_coef=0.001"
    flags = ["--model.balance_coef=0.25", "--model.router=naive_topk", "--data.max_val_tokens=64"]
    cli = resumed(LAST, *QUIET, same, *flags)
    assert cli.model.balance_coef == 0.25
    assert type(first_router(cli)) is ROUTERS["naive_topk"]
    [line] = said
    changed = "model.router sinkhorn -> naive_topk, model.balance_coef 0.5 -> 0.25, data.max_val_tokens 131072 -> 64"
    assert line == f"checkpoint: flags change the settings of saved/last.ckpt: {changed}"


def test_an_argument_of_the_router_alone_changes_that_argument(resumed, said):
    cli = resumed(*README, "--model.router.iterations=7")
    assert (first_router(cli).iterations, type(first_router(cli))) == (7, ROUTERS["sinkhorn"])
    assert "model.router.iterations 3 -> 7" in said[0]


def test_flags_before_the_configuration_are_obeyed_too(resumed, said):
    cli = resumed("--model.balance_coef", "0.25", *README)
    assert cli.model.balance_coef == 0.25
    assert "balance_coef" not in said[1]


REFUSED = {
    "--model.d_model=32": "model.d_model saved=16 current=32",
    "--model.num_experts=8": "model.num_experts saved=4 current=8",
    "--model.tie_embeddings=true": "model.tie_embeddings saved=False current=True",
    "--model=mlp": "model saved=decoder_moe current=mlp",
    "--data.tokenizer=bpe": "data.tokenizer saved=bytes current=bpe",
    "--data.seq_len=8": "data.seq_len saved=16 current=8",
    "--data.seed=6": "data.seed saved=5 current=6",
    "--data.batch_size=4": "data.batch_size x devices of saved/last.ckpt cannot change, got saved=2 current=4 x 1",
}


@pytest.mark.parametrize("flag", REFUSED)
def test_what_cannot_change_is_refused_before_any_work(trained, said, capsys, monkeypatch, flag):
    monkeypatch.setattr(MoECLI, "_run_subcommand", lambda self, command: pytest.fail("it has begun"))
    assert REFUSED[flag] in error_line(capsys, "fit", *README, flag, tiny=[])


def test_evaluation_may_take_other_windows_and_text(resumed, said):
    cli = resumed(LAST, *TRAINER, "--data.seq_len=8", "--data.path=other.txt", command="test")
    assert (cli.datamodule.hparams["seq_len"], cli.datamodule.hparams["path"]) == (8, "other.txt")
    changed = "data.path text.txt -> other.txt, data.seq_len 16 -> 8"
    assert said == [f"checkpoint: flags change the settings of saved/last.ckpt: {changed}"]


def test_a_file_sets_what_belongs_to_the_call(resumed, trained, said):
    config = {"model": {"temperature": 0, "balance_coef": 0.1}, "data": {"prompt": ["a", "b"], "cache_dir": "other"}}
    (trained / "call.yaml").write_text(yaml.safe_dump(config))
    cli = resumed("--config=call.yaml", LAST, *TRAINER, command="predict")
    assert (cli.model.temperature, cli.model.balance_coef) == (0, 0.5)
    assert (cli.datamodule.hparams["prompt"], cli.datamodule.hparams["cache_dir"]) == (["a", "b"], "other")
    assert len(said) == 1
    assert "model.balance_coef 0.5 (not 0.1)" in said[0]
    assert "prompt" not in said[0]


def test_the_checkpoint_may_be_named_by_a_file_or_be_the_last_one(resumed, trained, said):
    (trained / "run.yaml").write_text("ckpt_path: saved/last.ckpt\n")
    assert resumed("--config=run.yaml", *TRAINER, command="validate").model.balance_coef == 0.5
    last = ["--ckpt_path=last", "--checkpoint.dirpath=saved", *QUIET]
    assert resumed(*last, *README[:1]).model.balance_coef == 0.5


@pytest.mark.parametrize("command", ["fit", "test"])
def test_a_checkpoint_of_before_brings_its_settings(resumed, trained, said, command):
    as_before("saved/last.ckpt")
    cli = resumed(LAST, *TRAINER, "--model.balance_coef=0.25", command=command)
    assert (first_router(cli).iterations, cli.model.balance_coef, cli.datamodule.hparams["seed"]) == (3, 0.25, 5)
    assert said == ["checkpoint: flags change the settings of saved/last.ckpt: model.balance_coef 0.5 -> 0.25"]


def test_a_resumed_run_trains_with_its_flags_from_the_first_step(trained, said, losses):
    flags = ["--model.optimizer.learning_rate=0.5", "--model.optimizer.weight_decay=0.3", "--trainer.max_steps=6"]
    cli = run_cli("fit", LAST, *QUIET, *flags, "--model.optimizer.decay_steps=10", tiny=[])
    assert len(losses) == 2
    groups = cli.trainer.optimizers[0].param_groups
    assert [group["weight_decay"] for group in groups] == [0.3, 0.0]
    assert groups[0]["lr"] == pytest.approx(0.5 * 0.55)  # step 6 of 10, half of the cosine
    jumps = [line for line in said if line.startswith("resume: ")]
    assert len(jumps) == 1
    assert "step 4 goes from 0.025 to 0.434" in jumps[0]


def test_differences_of_nested_settings():
    router = {"class_path": "m.Sinkhorn", "init_args": {"iterations": 3}}
    saved = {"a": {"x": 1, "list": [1, 2]}, "r": router, "n": None}
    assert list(resume.differences(saved, saved)) == []
    current = {"a": {"x": 1.5, "list": [2, 1]}, "r": {"class_path": "n.Sinkhorn", "init_args": {"iterations": 4}}}
    assert list(resume.differences(saved, {**current, "n": 0})) == [
        ("a.x", 1, 1.5),
        ("a.list", [1, 2], [2, 1]),
        ("r.iterations", 3, 4),
        ("n", None, 0),
    ]
    assert list(resume.differences(saved, {"r": {"class_path": "m.NaiveTopK"}}, partial=True)) == [
        ("r", "sinkhorn", "naive_topk")
    ]
    assert list(resume.differences(saved, {"r": {"init_args": {"iterations": 3}}}, partial=True)) == []


def test_a_run_without_a_checkpoint_says_nothing(folder, parsed, said):
    parsed(f"--config={ROOT}/configs/quickstart.yaml", *TINY)
    assert said == []
