"""What an exported file says of itself: whose it is, which tokens it takes, which operators it needs."""

import onnx
import pytest
from tiny_export import VOCAB, export, graph, tiny_moe

from moe_lightning import __version__
from moe_lightning.data.tokenizer import load_tokenizer
from moe_lightning.export import model_files
from moe_lightning.export.__main__ import main
from moe_lightning.export.model_files import checkpoint_metadata
from moe_lightning.models import MLP
from moe_lightning.training.cli import MoECLI

SIZES = {"d_model": 16, "n_heads": 2, "n_layers": 1, "mlp_hidden_dim": 24, "num_experts": 3, "top_k": 2}


def facts(folder) -> dict[str, str]:
    return {fact.key: fact.value for fact in graph(folder).metadata_props}


@pytest.mark.parametrize(
    ("form", "domains"),
    [("portable", {""}), ("function", {"", "moe_lightning"}), ("ort", {"", "com.microsoft"})],
)
def test_a_model_says_its_sizes_and_router_and_imports_only_operators_that_it_has(tmp_path, form, domains):
    export(tiny_moe("naive_topk", n_layers=2), tmp_path, moe_form=form)
    imported = {opset.domain: opset.version for opset in graph(tmp_path).opset_import}
    assert set(imported) == domains
    for function in graph(tmp_path).functions:
        assert {opset.domain for opset in function.opset_import} == {node.domain for node in function.node}
    assert facts(tmp_path) == {
        "moe_lightning": __version__,
        "opset": str(imported[""]),
        "model": "decoder_moe",
        "router": "naive_topk",
        "vocab_size": str(VOCAB),
        **{name: str(size) for name, size in {**SIZES, "n_layers": 2}.items()},
        "activation": "swiglu",
        "rope_theta": "10000.0",
        "tie_embeddings": "False",
    }


def test_an_mlp_says_its_width(tmp_path):
    export(MLP(8), tmp_path)
    opset = graph(tmp_path).opset_import[0].version
    assert facts(tmp_path) == {"moe_lightning": __version__, "opset": str(opset), "model": "mlp", "hidden": "8"}


@pytest.mark.slow
def test_a_trained_model_says_its_step_context_and_tokenizer_from_callback_and_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 40)
    cli = MoECLI(
        args=[
            *("fit", "--model=decoder_moe", *(f"--model.{name}={value}" for name, value in SIZES.items())),
            *("--model.router=sinkhorn", "--data.path=text.txt", "--data.seq_len=16", "--data.batch_size=2"),
            *("--data.cache_dir=cache", "--trainer.accelerator=cpu", "--trainer.devices=1", "--trainer.max_steps=2"),
            *("--trainer.logger=false", "--checkpoint.dirpath=saved", "--progress_bar.refresh_rate=0"),
            *("--onnx_export.enabled=true", "--onnx_export.verify=never", "--data.tokenizer=bpe"),
            *("--trainer.limit_val_batches=1", "--data.vocab_size=260"),
        ]
    )
    main(["--ckpt_path", "saved/last.ckpt", "--seq_len=5", "--export_onnx_dir", "pair"])
    of_command, of_callback = facts(tmp_path / "pair"), facts(tmp_path / "saved" / "last")
    assert {name: of_callback.pop(name) for name in ("checkpoint", "written")}["checkpoint"].endswith(".ckpt")
    assert of_command == of_callback
    assert (of_command["step"], of_command["seq_len"], of_command["router"]) == ("2", "16", "sinkhorn")
    assert (of_command["vocab_size"], of_command["tokenizer"]) == ("320", "bpe")
    ids = load_tokenizer(of_command["tokenizer_json"]).encode("the lazy fox").tolist()
    assert ids == cli.datamodule._known_tokenizer().encode("the lazy fox").tolist()
    onnx.checker.check_model(str(tmp_path / "pair" / "__model__"))


def test_a_large_tokenizer_is_named_and_left_out(monkeypatch):
    checkpoint = {"global_step": 7, "TextDataModule": {"tokenizer": '{"kind": "bpe", "model": "long"}'}}
    assert checkpoint_metadata(checkpoint)["tokenizer_json"] == '{"kind": "bpe", "model": "long"}'
    monkeypatch.setattr(model_files, "LARGEST_TOKENIZER", 31)
    assert checkpoint_metadata(checkpoint) == {"step": "7", "tokenizer": "bpe"}


def test_a_checkpoint_of_other_data_has_its_step():
    assert checkpoint_metadata({"global_step": 7}) == {"step": "7"}
