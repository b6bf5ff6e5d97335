"""Arguments of `python -m moe_lightning.export`, and checkpoints."""

import hashlib
import runpy
import sys

import pytest
import torch
from tiny_export import FILES, contents, difference, error_line

from moe_lightning.export.__main__ import main
from moe_lightning.export.sources import trained_model
from moe_lightning.training.cli import MoECLI

DENSE = ["--batch=2", "--seq_len=6", "--vocab_size=31", "--d_model=16", "--n_heads=2", "--n_layers=1"]
DENSE += ["--mlp_hidden_dim=24"]


def test_transformer_decoder(tmp_path, capsys):
    main(["--model", "transformer_decoder", *DENSE, "--export_onnx_dir", str(tmp_path)])
    assert contents(tmp_path) == FILES
    assert "onnxruntime on random 3 x 9: largest difference" in capsys.readouterr().out


def test_decoder_moe(tmp_path, capsys):
    flags = [*DENSE, "--moe_n_experts=2", "--moe_top_k=1", "--router=naive_topk", "--onnx_moe=ort"]
    main(["--model", "decoder_moe", *flags, "--export_onnx_dir", str(tmp_path)])
    assert contents(tmp_path) == FILES


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--model=decoder_mow"], "export: model must be one of mlp, transformer_decoder, decoder_moe, got"),
        (["--dtype=bf16"], "export: dtype must be one of fp32, fp16, got 'bf16'"),
        (["--device=cuda"], "export: device must be one of cpu, got 'cuda'"),
        (["--onnx_moe=onnx"], "export: onnx_moe must be one of portable, ort, function, got 'onnx'"),
        (["--model=decoder_moe", *DENSE, "--onnx_moe=ort", "--dtype=fp16"], "export: onnx_moe ort must be fp32"),
        (["--batch=0"], "export: batch must be a positive integer"),
        (["--batch=two"], "invalid int value: 'two'"),
        (["--hidden=0"], "mlp: hidden must be a positive integer"),
        (["--seq_len=8"], "export: mlp has no sequence, got --seq_len 8"),
        (["--d_model=8"], "export: mlp takes --hidden, got --d_model"),
        (["--model=transformer_decoder", "--router=sinkhorn"], "got --router; leave those out"),
        (["--model=decoder_moe", "--router=sinkhron"], "did you mean sinkhorn?"),
        (["--ckpt_path=missing.ckpt"], "checkpoint: the file must exist"),
        (["--ckpt_path=missing.ckpt", "--d_model=8"], "a checkpoint brings its own model, got --d_model"),
        (["--unknown=1"], "unrecognized arguments: --unknown=1"),
    ],
)
def test_what_a_user_can_mend_is_one_line(tmp_path, capsys, flags, says):
    assert says in error_line(capsys, "--export_onnx_dir", str(tmp_path / "new"), *flags)
    assert contents(tmp_path) == []


def test_the_module_exits_with_2(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["export", "--export_onnx_dir", str(tmp_path), "--hidden=-1"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_module("moe_lightning.export", run_name="__main__")
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: mlp: hidden must be a positive integer below 2^31, got hidden=-1\n"


@pytest.mark.slow
def test_a_trained_checkpoint_brings_its_own_model(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = (hashlib.sha256(str(i).encode()).hexdigest()[:7] for i in range(500))
    (tmp_path / "text.txt").write_text(" ".join(words))
    sizes = {"d_model": 16, "n_heads": 2, "n_layers": 1, "mlp_hidden_dim": 16, "num_experts": 3, "top_k": 2}
    cli = MoECLI(
        args=[
            *("fit", "--model=decoder_moe", *(f"--model.{name}={value}" for name, value in sizes.items())),
            *("--model.router=sinkhorn", "--model.router.iterations=3", "--model.router.skew_experts=1"),
            *("--model.router.skew_bias=0.5", "--data.path=text.txt", "--data.seq_len=16", "--data.batch_size=2"),
            *("--data.cache_dir=cache", "--trainer.accelerator=cpu", "--trainer.devices=1", "--trainer.max_steps=2"),
            *("--trainer.logger=false", "--checkpoint.dirpath=saved", "--progress_bar.refresh_rate=0"),
        ]
    )
    main(["--ckpt_path", "saved/last.ckpt", "--seq_len=5", "--export_onnx_dir", "pair"])
    assert contents(tmp_path / "pair") == FILES
    network = cli.model.network.eval()
    assert difference(tmp_path / "pair", network, torch.randint(0, 256, (2, 7))) <= 1e-5
    router = trained_model("saved/last.ckpt").moe_layers[0].router
    assert (type(router).__name__, router.iterations, router.skew_E[0].item()) == ("Sinkhorn", 3, 0.5)

    whole = (tmp_path / "saved" / "last.ckpt").read_bytes()
    (tmp_path / "saved" / "last.ckpt").write_bytes(whole[:1000] + bytes([whole[1000] ^ 1]) + whole[1001:])
    assert "is damaged" in error_line(capsys, "--ckpt_path=saved/last.ckpt", "--export_onnx_dir=other")
    assert not (tmp_path / "other").exists()
