"""What a user gets wrong is answered in one line that names the field and the value, before any data is read."""

import os
import resource
import sys

import pytest
import torch
from scripts import run_script
from tiny_run import DATA, ROOT, TINY, TRAINER, error_line, run_cli, text

from moe_lightning.layers import MoE
from moe_lightning.training.language_module import LanguageModule
from moe_lightning.utils.errors import ContextLostError, plain_errors

_opened: set[str] = set()
_watching = False


def _note_open(event: str, arguments: tuple) -> None:
    if _watching and event == "open":
        _opened.add(str(arguments[0]))


sys.addaudithook(_note_open)  # cannot be taken out again; costs nothing while not watching


@pytest.fixture
def unread(folder):
    """The corpus of this test must not be opened."""
    global _watching
    _opened.clear()
    _watching = True
    yield
    _watching = False
    assert not [path for path in _opened if path.endswith("text.txt")]


@pytest.fixture
def little_memory():
    """No allocation over 4 GiB beyond what is in use: a huge size fails at once instead of filling the machine."""
    limits = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm") as file:
        in_use = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (in_use + (4 << 30), limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, limits)


# flags (behind those of the tiny run) -> what the line must name
FLAGS = {
    "--model.top_k=9": ("top_k=9", "num_experts=4"),
    "--model.d_model=15": ("d_model=15", "n_heads=2"),
    "--model.d_model=-16": ("d_model=-16",),
    "--model.n_heads=0": ("n_heads=0",),
    "--model.n_layers=-1": ("n_layers=-1",),
    "--model.mlp_hidden_dim=-1": ("mlp_hidden_dim=-1",),
    "--model.num_experts=-4": ("num_experts=-4",),
    "--model.top_k=0": ("top_k=0",),
    "--model.dropout=1.5": ("dropout=1.5",),
    "--model.dropout=null": ("dropout", "None"),
    "--model.rope_theta=-1": ("rope_theta", "-1"),
    "--model.rope_theta=.nan": ("rope_theta", "nan"),
    "--model.rope_theta=null": ("rope_theta", "None"),
    "--model.balance_coef=-0.1": ("balance_coef=-0.1",),
    "--model.balance_coef=null": ("balance_coef", "None"),
    "--model.z_coef=.nan": ("z_coef=nan",),
    "--model.temperature=-1": ("temperature", "-1"),
    "--model.temperature=.nan": ("temperature", "nan"),
    "--model.max_new_tokens=-1": ("max_new_tokens", "-1"),
    "--model.optimizer.learning_rate=.nan": ("learning_rate=nan",),
    "--model.optimizer.learning_rate=nan": ("learning_rate", "nan"),
    "--model.optimizer.learning_rate=-1": ("learning_rate=-1",),
    "--model.optimizer.learning_rate=.inf": ("learning_rate=inf",),
    "--model.optimizer.weight_decay=-1": ("weight_decay=-1",),
    "--model.optimizer.beta1=1": ("beta1=1",),
    "--model.optimizer.warmup_steps=-1": ("warmup_steps=-1",),
    "--model.optimizer.min_lr_ratio=2": ("min_lr_ratio=2",),
    "--model.optimizer.decay_steps=0": ("decay_steps=0",),
    "--model.optimizer.decay_steps=abc": ("decay_steps", "abc"),
    "--model.router=sinkhor": ("sinkhor", "did you mean sinkhorn?"),
    "--model.router=top_k_naive": ("top_k_naive", "naive_topk"),
    "--model.router=zzz": ("zzz", "naive_topk", "masked_matmul", "fused_select", "sinkhorn"),
    "--model.router=moe_lightning.routers.Nothing": ("model.router", "Nothing"),
    "--model.router=torch.nn.Linear": ("model.router", "torch.nn.Linear"),
    "--model.router=os.system": ("model.router", "os.system"),
    "--model.router=sinkhorn --model.router.iterations=0": ("iterations=0",),
    "--model.router=sinkhorn --model.router.iterations=many": ("model.router.iterations", "many"),
    "--model.router=sinkhorn --model.router.temperature=-1": ("temperature=-1",),
    "--model.router=naive_topk --model.router.skew_experts=9": ("skew_experts=9", "num_experts=4"),
    "--model.router=naive_topk --model.router.skew_bias=.nan": ("skew_bias=nan",),
    "--model.router=naive_topk --model.router.capacity_factor=0": ("capacity_factor=0",),
    "--model.router=naive_topk --model.router.iterations=3": ("model.router.iterations",),
    "--model.router.foo=1": ("model.router.foo",),
    "--model=decoder_mo": ("decoder_mo", "did you mean decoder_moe?"),
    "--model=nothing.Here": ("model", "nothing"),
    "--model.experts=slow": ("model.experts", "slow", "grouped_mm"),
    "--model.activation=relu": ("model.activation", "relu", "swiglu"),
    "--model.d_model=wide": ("model.d_model", "wide"),
    "--model.d_model=1.5": ("model.d_model", "1.5"),
    "--model.foo=1": ("model.foo",),
    "--model.optimizer.foo=1": ("model.optimizer.foo",),
    "--data.foo=1": ("data.foo",),
    "--trainer.foo=1": ("trainer.foo",),
    "--foo=1": ("foo",),
    "--router_timing.foo=1": ("router_timing.foo",),
    "--checkpoint.foo=1": ("checkpoint.foo",),
    "--data.seq_len=-1": ("seq_len", "-1"),
    "--data.batch_size=0": ("batch_size", "0"),
    "--data.batch_size=two": ("data.batch_size", "two"),
    "--data.max_val_tokens=0": ("max_val_tokens", "0"),
    "--data.max_val_tokens=all": ("max_val_tokens", "all"),
    "--data.seed=-1": ("seed", "-1"),
    "--data.num_workers=-1": ("num_workers", "-1"),
    "--data.num_workers=1000000000000": ("num_workers", "1000000000000"),
    "--data.tokenizer=words": ("data.tokenizer", "words"),
    "--data.vocab_size=300": ("vocab_size", "300"),
    "--data.tokenizer=bpe --data.vocab_size=3": ("vocab_size", "3"),
    "--data.cache_dir=": ("cache_dir",),
    "--expert_load.image_every_n_steps=-1": ("image_every_n_steps=-1",),
    "--throughput.peak_flops=.nan": ("peak_flops=nan",),
    "--trainer.max_steps=many": ("trainer.max_steps", "many"),
    "--trainer.max_steps=-5": ("max_steps", "-5"),
    "--trainer.logger=WandbLogger": ("WandbLogger", "pip install -U 'wandb"),
    "--trainer.logger=CometLogger": ("CometLogger", "pip install -U 'comet-ml"),
    "--trainer.precision=8": ("trainer.precision", "8"),
    "--trainer.accelerator=abacus": ("accelerator", "abacus"),
    "--trainer.devices=-3": ("devices",),
    "--trainer.devices=1000000000000": ("trainer: devices must be in [-1, 1024], got devices=1000000000000",),
    "--trainer.devices=1025": ("trainer: devices must be in [-1, 1024], got devices=1025",),
    "--trainer.num_nodes=1000000": ("trainer: num_nodes must be in [-1, 65536], got num_nodes=1000000",),
    "--seed_everything=-1": ("-1",),
    "--config=missing.yaml": ("missing.yaml",),
    "--config=.": ("config",),
    "--data.path=missing.txt": ("path", "missing.txt"),
    "--data.path=missing/*.txt": ("path", "missing/*.txt"),
    "--ckpt_path=missing.ckpt": ("missing.ckpt",),
    "--ckpt_path=http://127.0.0.1:9/x.ckpt": ("http://127.0.0.1:9/x.ckpt",),
    "--ckpt_path=http://127.0.0.1:9/x": ("http://127.0.0.1:9/x",),
}


@pytest.mark.parametrize("flags", FLAGS)
def test_flags(unread, capsys, monkeypatch, flags):
    monkeypatch.setattr("lightning.Trainer.fit", _prepare_only)
    line = error_line(capsys, "fit", *flags.split(" "))
    assert [part for part in FLAGS[flags] if part not in line] == [], line
    assert "NoneType" not in line, line
    assert len(line) < 400, line


def _prepare_only(trainer, model, datamodule, ckpt_path=None, **kwargs):
    """What `Trainer.fit` would do first; a wrong value has to be found before, or here at the latest."""
    if ckpt_path is not None:
        trainer.strategy.load_checkpoint(ckpt_path)
    if "missing" in str(datamodule.hparams.path):
        datamodule.prepare_data()
    raise AssertionError("nothing was wrong")


YAML = {
    "model: {name: decoder_moe, optimizer: {learning_rate: .nan}}": ("learning_rate=nan",),
    "model: {name: decoder_moe, optimizer: {learning_rate: -1}}": ("learning_rate=-1",),
    "model: {name: decoder_moe, top_k: 9, num_experts: 8}": ("top_k=9", "num_experts=8"),
    "model: {name: decoder_moe, num_experts: -8}": ("num_experts=-8",),
    "model: {name: decoder_moe, d_model: 130}": ("d_model=130", "n_heads=8"),
    "model: {name: decodr_moe}": ("decodr_moe", "decoder_moe"),
    "model: {name: decoder_moe, router: fused_selct}": ("fused_selct", "did you mean fused_select?"),
    "model: {name: decoder_moe, router: {name: sinkhorn, foo: 1}}": ("model.router.foo",),
    "model: {name: decoder_moe, optimizer: {foo: 1}}": ("model.optimizer.foo",),
    "model: {name: decoder_moe, foo: 1}": ("model.foo",),
    "model: {name: 5}": ("model", "5"),
    "model: {name: decoder_moe, router: {name: 5}}": ("router", "5"),
    "model: {name: decoder_moe, router: [1]}": ("router", "[1]"),
    "model: [1]": ("model", "[1]"),
    "data: {foo: 1}": ("data.foo",),
    "data: {batch_size: two}": ("data.batch_size", "two"),
    "data: hello": ("data", "hello"),
    "trainer: {foo: 1}": ("trainer.foo",),
    "foo: 1": ("foo",),
    "model: {name: decoder_moe": ("line 1",),
    "model:\n\t- a": ("line 2",),
    "- 1\n- 2": ("config",),
    "hello": ("config", "hello"),
    "a: \x00": ("config",),
}


@pytest.mark.parametrize("content", YAML)
def test_configuration_files(unread, folder, capsys, monkeypatch, content):
    monkeypatch.setattr("lightning.Trainer.fit", _prepare_only)
    (folder / "run.yaml").write_text(content)
    line = error_line(capsys, "fit", "--config=run.yaml", tiny=[*DATA, *TRAINER])
    assert [part for part in YAML[content] if part not in line] == [], line
    assert "NoneType" not in line, line


@pytest.mark.parametrize(
    "callback", ["EMAWeightAveraging", "{class_path: StochasticWeightAveraging, init_args: {swa_lrs: 0.1}}"]
)
def test_weight_averaging_of_spread_experts_is_refused_at_the_start(unread, capsys, callback):
    line = error_line(capsys, "fit", "--trainer.strategy=ddp_ep", f"--trainer.callbacks={callback}")
    assert line.startswith("strategy: under ddp_ep")
    assert "WeightAveraging" in line


def test_configuration_that_is_no_text(unread, folder, capsys):
    (folder / "run.yaml").write_bytes(b"\xff\xfe\x81")
    assert "run.yaml" in error_line(capsys, "fit", "--config=run.yaml")


@pytest.mark.parametrize("field", ["d_model", "mlp_hidden_dim", "num_experts", "n_layers", "top_k"])
@pytest.mark.parametrize("value", [1 << 30, 1 << 31, 10**18], ids=["2^30", "2^31", "10^18"])
def test_huge_sizes(unread, capsys, monkeypatch, little_memory, field, value):
    made = []
    init = MoE.__init__

    def counted(self, *args, **kwargs):
        made.append(self)
        if len(made) > 50:
            pytest.fail(f"{field}={value}: layers are made one after the other until the memory is full")
        init(self, *args, **kwargs)

    monkeypatch.setattr(MoE, "__init__", counted)
    line = error_line(capsys, "fit", f"--model.{field}={value}")
    assert field in line
    assert str(value) in line
    assert "NoneType" not in line


def test_what_lightning_itself_refuses_in_a_fit_is_one_line(folder, capsys):
    line = error_line(capsys, "fit", "--trainer.val_check_interval=5000", "--trainer.logger=false")
    assert line.startswith("trainer: settings must fit each other, got: `val_check_interval` (5000) must be less than")
    assert line.endswith("set `check_val_every_n_epoch=None`.")


def test_too_little_text(folder, capsys):
    (folder / "text.txt").write_text(text(300))
    line = error_line(capsys, "fit", "--data.seq_len=1000000000")
    assert "seq_len" in line
    assert "1000000001" in line


def test_no_model_and_no_command(folder, capsys):
    assert "model" in error_line(capsys, "fit", tiny=DATA)
    assert "fitt" in error_line(capsys, "fitt", tiny=[])


def test_train_py_itself(folder):
    done = run_script(folder, str(ROOT / "train.py"), "fit", *TINY, "--model.top_k=9")
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "error: router: top_k must be in [1, num_experts], got top_k=9, num_experts=4; lower top_k or add experts"
    ]
    assert done.stdout == ""


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("shape '[2, 3]' is invalid for input of size 5"),
        ValueError("not enough values to unpack (expected 2, got 1)"),
        ValueError("too many values: 3\nsecond line"),
        TypeError("unsupported operand type(s) for +: 'int' and 'str'"),
        TypeError("forward() missing 1 required positional argument: 'x'"),
        ValueError("Expected more than 1 value per channel, got input size [1]"),
        KeyError("model: x"),
        ValueError(""),
    ],
    ids=lambda error: str(error)[:30],
)
def test_an_unexpected_error_keeps_its_traceback(folder, monkeypatch, error):
    def broken(*args):
        raise error

    monkeypatch.setattr(LanguageModule, "training_step", broken)
    with pytest.raises(type(error)) as caught, plain_errors():
        run_cli("fit", "--trainer.fast_dev_run=true", "--trainer.logger=false")
    assert caught.value is error


@pytest.mark.parametrize("noted", [True, False])
def test_a_lost_cuda_context_is_one_line_and_ends_the_process_at_once(noted, capsys, monkeypatch):
    def leave(status):
        raise SystemExit(status)

    fault = "dispatch: rank 1 of the group did not come within timeout_seconds=25; look at that rank's log"
    error = torch.AcceleratorError("CUDA error: unspecified launch failure") if noted else ContextLostError(fault)
    if noted:
        error.add_note(fault)
    monkeypatch.setattr(os, "_exit", leave)
    with pytest.raises(SystemExit) as stop, plain_errors():
        raise error
    assert stop.value.code == 2
    assert capsys.readouterr().err == f"error: {fault}\n"


def test_error_of_the_project_in_mid_training_is_one_line(folder, capsys, monkeypatch):
    def broken(*args):
        raise ValueError("router: logits must be finite, got 3 invalid rows in a step")

    monkeypatch.setattr(LanguageModule, "training_step", broken)
    with pytest.raises(SystemExit) as stop, plain_errors():
        run_cli("fit", "--trainer.max_steps=1")
    assert stop.value.code == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert errors == ["error: router: logits must be finite, got 3 invalid rows in a step"]
