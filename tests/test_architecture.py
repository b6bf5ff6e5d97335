"""The picture of docs/architecture.md is that of the tree."""

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "docs" / "draw_architecture.py"


@pytest.fixture
def script():
    spec = importlib.util.spec_from_file_location("draw_architecture", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_picture_is_of_this_tree(script):
    assert script.PICTURE.read_text() == script.draw(), "run `python docs/draw_architecture.py`"


def test_the_picture_has_every_package_in_order(script):
    packages = {path.parent.name for path in (ROOT / "moe_lightning").glob("*/__init__.py")}
    picture = script.draw()
    assert {package for floor in script.order() for package in floor} == packages
    drawn = [picture.index(f">{package}/<") for floor in reversed(script.order()) for package in floor]
    assert drawn == sorted(drawn)
    assert picture.index(">kernels/<") > drawn[-1]


def test_a_new_file_or_folder_changes_the_picture(script, monkeypatch, tmp_path):
    for name, text in {
        "tests/test_layering.py": "ORDER = (('_cpu',), ('ops',), ('novel', 'absent'))\n",
        "moe_lightning/ops/__init__.py": '"""What `ops` do."""\n',
        "moe_lightning/novel/__init__.py": '"""Novel."""\n',
        "moe_lightning/novel/deep/__init__.py": "",
        "kernels/include/x.h": "",
        "kernels/cuda/x/x.cu": "",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(script, "ROOT", tmp_path)
    before = script.draw()
    for part in (">ops/<", ">What ops do.<", ">novel/<", ">deep/<", ">include/  cuda/x/<"):
        assert part in before
    assert "absent" not in before
    (tmp_path / "moe_lightning/ops/select.py").write_text("")
    assert ">select<" in script.draw()
