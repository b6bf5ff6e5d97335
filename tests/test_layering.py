"""The order of packages of docs/architecture.md: imports and includes run downwards only.

`violations(root)` reads the sources of a repository and runs none of them; planted repositories prove that it bites.
"""

import ast
import re
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "moe_lightning"
#: From the lowest floor up; packages of one floor do not import each other.
ORDER = (
    ("_cpu", "_cuda"),
    ("utils",),
    ("ops", "metrics"),
    ("routers",),
    ("layers",),
    ("expert_parallel", "models"),
    ("data",),
    ("integrations", "export"),
    ("callbacks",),
    ("training",),
    ("bench", "report"),
)
PACKAGES = {package for floor in ORDER[1:] for package in floor} - {"integrations"}  # which is yet to come
FLOORS = {package: floor for floor, packages in enumerate(ORDER) for package in packages}
#: Below data there are torch, what it needs itself, and the standard library; the frameworks stay above.
BELOW_DATA = {*sys.stdlib_module_names, "torch", "typing_extensions", PACKAGE}
ALSO = {"metrics": {"torchmetrics"}, "models": {"yaml"}}
TORCH_BRIDGES = ("torch.utils.tensorboard", "torch.onnx")
#: A kernel folder and the folders whose headers it may include.
KERNEL_FOLDERS = {
    "include": {"include"},
    "cpu": {"include", "cpu"},
    "cuda": {"include", "cuda"},
    "bindings": {"include", "bindings"},
}
FORBIDDEN_HEADERS = re.compile(r"^(torch|ATen|c10|caffe2)(/|\.h)")
PYTHON_HEADERS = re.compile(r"^(pybind11/|Python\.h)")
DYNAMIC = {"import_module", "__import__"}
#: Modules whose imports are named by what they read: a build, a checkpoint, the root's table of exports.
COMPUTED = {"ops.native", "models.hyperparameters", PACKAGE}


def module_name(path: Path, root: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path, root: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of all imports, at any depth of the code; `from a import b` gives `a.b`.

    Of the package's root, only those that run: its exports are imported at their first use.
    """
    name = module_name(path, root)
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    tree = ast.parse(path.read_text())
    if name == PACKAGE:
        tree.body = [n for n in tree.body if not (isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING")]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join(
                    [*package.split(".")[: len(package.split(".")) - node.level + 1], *filter(None, [base])]
                )
            for alias in node.names:
                yield node.lineno, f"{base}.{alias.name}"
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) in DYNAMIC:
            argument = node.args[0] if node.args else None
            if isinstance(argument, ast.Constant):
                yield node.lineno, str(argument.value)
            elif name.removeprefix(f"{PACKAGE}.") not in COMPUTED:
                yield node.lineno, "<computed>"


#: What routers that differ from `topk` in little are built on.
ROUTER_FAMILY = f"{PACKAGE}.routers.topk."


def package_of(name: str) -> str:
    """The package that a module is in; empty for the root and for what is not ours."""
    parts = name.split(".")
    return parts[1] if parts[0] == PACKAGE and len(parts) > 1 else ""


def floor_of(name: str) -> int | None:
    """Floor of a module; None for the root and for other packages."""
    return FLOORS.get(package_of(name))


def concrete_names(root: Path) -> tuple[set[str], set[str]]:
    """(modules, classes) of the concrete routers, as the registry lists them, and the concrete dispatcher classes."""
    modules, classes = set(), set()
    registry = root / PACKAGE / "routers" / "registry.py"
    for node in ast.walk(ast.parse(registry.read_text())):
        if isinstance(node, ast.Dict):
            classes |= {value.id for value in node.values if isinstance(value, ast.Name)}
    for _, name in imports(registry, root):
        module, _, imported = name.rpartition(".")
        if imported in classes:
            modules.add(module)
    return modules, classes


def concrete_dispatchers(root: Path) -> set[str]:
    """Wherever they stand."""
    nodes = (node for path in (root / PACKAGE).rglob("*.py") for node in ast.walk(ast.parse(path.read_text())))
    return {n.name for n in nodes if isinstance(n, ast.ClassDef) and n.name.endswith("Dispatcher")} - {"Dispatcher"}


def python_violations(root: Path) -> Iterator[str]:
    router_modules, router_classes = concrete_names(root)
    dispatchers = concrete_dispatchers(root)
    for path in sorted((root / PACKAGE).rglob("*.py")):
        name = module_name(path, root)
        floor = floor_of(name)
        if floor is None and name != PACKAGE:
            yield f"{name}: on no floor; add it to docs/architecture.md and to FLOORS"
            continue
        for line, target in imports(path, root):
            where = f"{path.relative_to(root)}:{line}: {target}"
            module, _, imported = target.rpartition(".")
            is_concrete_router = (module.startswith(f"{PACKAGE}.routers") and imported in router_classes) or any(
                target == m or target.startswith(f"{m}.") for m in router_modules
            )
            if target.split(".")[0] == PACKAGE:
                # `from moe_lightning.ops import _cpu` and `from moe_lightning import models` both end in a module.
                upper = floor_of(target)
                is_export = target.count(".") == 1 and upper is None and imported != "__version__"
                if name == PACKAGE or is_export or (upper is not None and upper > floor):
                    yield f"{where}: runs up the floors"
                elif upper == floor and package_of(target) != package_of(name):
                    yield f"{where}: runs across a floor"
            elif (floor or 0) < FLOORS["data"] and (
                target.split(".")[0] not in BELOW_DATA | ALSO.get(package_of(name), set())
                or target.startswith(TORCH_BRIDGES)
            ):
                yield f"{where}: belongs in data or above"
            is_family = target.startswith(ROUTER_FAMILY)
            if name in router_modules and is_concrete_router and not is_family and module != name:
                yield f"{where}: a router imports another"
            if name.startswith(f"{PACKAGE}.callbacks") and is_concrete_router:
                yield f"{where}: a callback knows a concrete router"
            if name.startswith(f"{PACKAGE}.callbacks") and imported in dispatchers:
                yield f"{where}: a callback knows a concrete dispatcher"


def include_violations(root: Path) -> Iterator[str]:
    kernels = root / "kernels"
    sources = [p for p in sorted(kernels.rglob("*")) if p.suffix in (".h", ".hpp", ".cuh", ".cpp", ".cc", ".cu")]
    owners = {p.name: p.relative_to(kernels).parts[0] for p in sources}
    for path in sources:
        folder = path.relative_to(kernels).parts[0]
        for line, text in enumerate(path.read_text().splitlines(), 1):
            match = re.match(r'\s*#\s*include\s*[<"]([^>"]+)[>"]', text)
            if not match:
                continue
            header = match[1]
            where = f"{path.relative_to(root)}:{line}: {header}"
            if FORBIDDEN_HEADERS.match(header):
                yield f"{where}: a torch header in kernels"
            elif PYTHON_HEADERS.match(header) and folder != "bindings":
                yield f"{where}: python belongs in bindings"
            elif owners.get(Path(header).name, folder) not in KERNEL_FOLDERS.get(folder, {folder}):
                yield f"{where}: {folder} includes from {owners[Path(header).name]}"
    for path in sorted(kernels.rglob("CMakeLists.txt")):
        if re.search(r"find_package\s*\(\s*Torch|TORCH_LIBRARIES", path.read_text(), re.IGNORECASE):
            yield f"{path.relative_to(root)}: links torch"


def violations(root: Path) -> list[str]:
    return [*python_violations(root), *include_violations(root)]


def test_no_arrow_runs_up():
    assert violations(ROOT) == []


def test_every_floor_was_read():
    modules = {module_name(p, ROOT) for p in (ROOT / PACKAGE).rglob("*.py")}
    assert {package_of(name) for name in modules} >= PACKAGES
    arrows = {
        (package_of(module_name(p, ROOT)), package_of(t))
        for p in (ROOT / PACKAGE).rglob("*.py")
        for _, t in imports(p, ROOT)
    }
    assert arrows >= {("ops", "utils"), ("routers", "ops"), ("layers", "routers"), ("expert_parallel", "layers")}
    assert arrows >= {("models", "layers"), ("export", "models"), ("training", "callbacks"), ("bench", "layers")}
    assert {p.suffix for p in (ROOT / "kernels").rglob("*.*")} >= {".h", ".cpp", ".cu"}


def test_the_concrete_classes_are_those_of_the_running_package():
    from moe_lightning.routers import ROUTERS

    modules, classes = concrete_names(ROOT)
    assert classes == {router.__name__ for router in ROUTERS.values()}
    assert modules == {router.__module__ for router in ROUTERS.values()}
    assert concrete_dispatchers(ROOT) >= {"PermuteDispatcher", "MaskedDispatcher", "SymmetricDispatcher"}


REGISTRY = """
from moe_lightning.routers.alpha import Alpha
from moe_lightning.routers.beta import Beta
ROUTERS = {"alpha": Alpha, "beta": Beta}
"""


@pytest.fixture
def planted(tmp_path):
    """A small sound repository."""
    files = {
        "moe_lightning/__init__.py": "",
        "moe_lightning/ops/__init__.py": "import torch\nfrom moe_lightning import _cpu\n",
        "moe_lightning/routers/__init__.py": "from moe_lightning.routers.registry import ROUTERS\n",
        "moe_lightning/routers/registry.py": REGISTRY,
        "moe_lightning/routers/base.py": "from moe_lightning.ops import select\n",
        "moe_lightning/routers/alpha.py": "from moe_lightning.routers.base import Router\n",
        "moe_lightning/routers/beta.py": "from .base import Router\n",
        "moe_lightning/layers/dispatch.py": "class Dispatcher: ...\nclass LocalDispatcher(Dispatcher): ...\n",
        "moe_lightning/expert_parallel/far.py": "class FarDispatcher: ...\n",
        "moe_lightning/callbacks/load.py": "import lightning\nfrom moe_lightning.routers import Router\n",
        "moe_lightning/training/cli.py": "import lightning, onnx\nfrom moe_lightning import callbacks\n",
        "kernels/include/select.h": "#include <cstdint>\n",
        "kernels/cpu/parallel.h": "#pragma once\n",
        "kernels/cpu/select.cpp": '#include "select.h"\n#include "parallel.h"\n',
        "kernels/bindings/cpu.cpp": "#include <pybind11/pybind11.h>\n",
        "kernels/CMakeLists.txt": "find_package(pybind11)\n",
    }
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert violations(tmp_path) == []
    return tmp_path


@pytest.mark.parametrize(
    ("file", "line", "says"),
    [
        *(
            (f"moe_lightning/{below}/x.py", f"from moe_lightning.{above} import x", "runs up")
            for floor, above_it in pairwise(ORDER[1:])
            for below in floor
            for above in above_it
        ),
        *(
            (f"moe_lightning/{one}/x.py", f"import moe_lightning.{other}.x", "runs across")
            for floor in ORDER[1:]
            for one in floor
            for other in floor
            if one != other
        ),
        ("moe_lightning/ops/x.py", "from moe_lightning.routers import Router", "runs up"),
        ("moe_lightning/ops/x.py", "from moe_lightning import models", "runs up"),
        ("moe_lightning/ops/x.py", "from .. import layers", "runs up"),
        ("moe_lightning/ops/x.py", "from ..layers.dispatch import Dispatcher", "runs up"),
        ("moe_lightning/routers/x.py", "import moe_lightning.layers", "runs up"),
        ("moe_lightning/layers/x.py", "def f():\n    from moe_lightning.models import generate", "runs up"),
        ("moe_lightning/models/x.py", "import importlib\nimportlib.import_module('moe_lightning.training')", "runs up"),
        ("moe_lightning/models/x.py", "if False:\n    from moe_lightning.callbacks import load", "runs up"),
        ("moe_lightning/callbacks/x.py", "from moe_lightning.bench import run", "runs up"),
        ("moe_lightning/__init__.py", "from moe_lightning.ops import select", "runs up"),
        ("moe_lightning/__init__.py", "def f():\n    from moe_lightning.ops import select", "runs up"),
        ("moe_lightning/__init__.py", "if not TYPE_CHECKING:\n    import moe_lightning.ops", "runs up"),
        ("moe_lightning/ops/x.py", "from moe_lightning import MoE", "runs up"),
        ("moe_lightning/bench/x.py", "from moe_lightning import MoE", "runs up"),
        ("moe_lightning/models/x.py", "import lightning as L", "belongs in data or above"),
        ("moe_lightning/layers/x.py", "from torchmetrics import Metric", "belongs in data or above"),
        ("moe_lightning/ops/x.py", "import onnx", "belongs in data or above"),
        ("moe_lightning/ops/x.py", "import onnxscript.values", "belongs in data or above"),
        ("moe_lightning/models/x.py", "from torch.utils.tensorboard import SummaryWriter", "belongs in data or above"),
        ("moe_lightning/models/x.py", "from importlib import import_module as i\n__import__(name)", "<computed>"),
        ("moe_lightning/routers/alpha.py", "from moe_lightning.routers.beta import Beta", "a router imports another"),
        ("moe_lightning/routers/alpha.py", "from moe_lightning.routers import Beta", "a router imports another"),
        ("moe_lightning/routers/alpha.py", "from . import beta", "a router imports another"),
        ("moe_lightning/callbacks/x.py", "from moe_lightning.routers import Alpha", "concrete router"),
        ("moe_lightning/callbacks/x.py", "from moe_lightning.routers.beta import helper", "concrete router"),
        ("moe_lightning/callbacks/x.py", "from moe_lightning.layers.dispatch import LocalDispatcher", "dispatcher"),
        ("moe_lightning/callbacks/x.py", "from moe_lightning.expert_parallel.far import FarDispatcher", "dispatcher"),
        ("moe_lightning/novel/x.py", "import torch", "on no floor"),
        ("kernels/cuda/x.cu", "#include <torch/extension.h>", "a torch header"),
        ("kernels/include/x.h", "#  include <ATen/ATen.h>", "a torch header"),
        ("kernels/bindings/x.cpp", '#include "c10/cuda/CUDAStream.h"', "a torch header"),
        ("kernels/cpu/x.cpp", "#include <pybind11/pybind11.h>", "python belongs in bindings"),
        ("kernels/include/x.h", '#include "parallel.h"', "include includes from cpu"),
        ("kernels/cuda/x.cu", '#include "../cpu/parallel.h"', "cuda includes from cpu"),
        ("kernels/CMakeLists.txt", "find_package(Torch REQUIRED)", "links torch"),
    ],
)
def test_a_planted_violation_is_caught(planted, file, line, says):
    path = planted / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text((path.read_text() if path.exists() else "") + line + "\n")
    found = violations(planted)
    assert len(found) >= 1
    assert all(says in text for text in found), found
    assert all(Path(file).name in text or Path(file).parent.name in text for text in found)


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("moe_lightning/callbacks/x.py", "from moe_lightning.layers.dispatch import Dispatcher"),
        ("moe_lightning/__init__.py", "if TYPE_CHECKING:\n    from moe_lightning.ops import select"),
        ("moe_lightning/bench/x.py", "from moe_lightning import __version__"),
        ("moe_lightning/training/x.py", "from moe_lightning.routers.beta import Beta"),
        ("moe_lightning/models/x.py", "from __future__ import annotations\nimport math\nfrom torch import nn"),
        ("moe_lightning/routers/alpha.py", "from moe_lightning.routers.losses import z_loss"),
        ("kernels/cuda/x.cu", "#include <cuda_runtime.h>\n#include <cutlass/gemm/gemm.h>"),
        ("kernels/cpu/x.cpp", "// #include <torch/extension.h>"),
    ],
)
def test_what_is_allowed_passes(planted, file, line):
    path = planted / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text((path.read_text() if path.exists() else "") + line + "\n")
    assert violations(planted) == []
