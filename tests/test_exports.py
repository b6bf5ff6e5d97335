"""`import moe_lightning` offers the library's names and imports nothing until one is used."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import moe_lightning
from moe_lightning import callbacks, training
from moe_lightning.routers import ROUTERS
from moe_lightning.training import strategy


def test_the_import_alone_imports_no_framework():
    code = "import sys, moe_lightning; print(*{name.partition('.')[0] for name in sys.modules})"
    loaded = set(
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    )
    assert "moe_lightning" in loaded
    assert not loaded & {"torch", "numpy", "lightning", "torchmetrics", "onnx", "rich"}


def test_every_name_is_the_one_of_its_package():
    for name in moe_lightning.__all__:
        value = getattr(moe_lightning, name)
        assert name == "__version__" or value.__name__ == name
        assert name in dir(moe_lightning)
    from moe_lightning.layers.moe import MoE

    assert moe_lightning.MoE is MoE


def test_routers_callbacks_strategies_modules_and_ops_are_offered():
    offered = set(moe_lightning.__all__)
    assert offered >= {"MoE", "Experts", "select", "build_index", "permute", "unpermute", "expert_ffn"}
    assert offered >= {router.__name__ for router in ROUTERS.values()}
    assert offered >= set(callbacks.__all__)
    assert offered >= set(strategy.__all__)
    assert offered >= {"DecoderMoEModule", "MLPModule", "TransformerDecoderModule"}
    assert training.__name__ == "moe_lightning.training"  # a package is still one


def test_type_checkers_read_the_names_that_run():
    tree = ast.parse(Path(moe_lightning.__file__).read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    read = {alias.name: node.module for node in block.body for alias in node.names}
    assert read == moe_lightning._MODULE_OF


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'moe_lightning' has no attribute 'Moe'"):
        _ = moe_lightning.Moe
    with pytest.raises(ImportError, match="cannot import name 'Moe'"):
        from moe_lightning import Moe  # noqa: F401
