"""Training where neither native module can be imported. Catalogue row 52."""

import pytest
from scripts import run_script
from tiny_run import TINY, run_cli

from moe_lightning.utils.checkpoint_file import load_checkpoint

SCRIPT = """
import sys

sys.modules |= {"moe_lightning._cpu": None, "moe_lightning._cuda": None}
from moe_lightning.ops import native
from moe_lightning.training.cli import MoECLI

assert native.missing("cpu") and native.missing("cuda")
MoECLI()
"""
RUN = ["--trainer.max_steps=4", "--trainer.val_check_interval=4"]


@pytest.mark.slow
def test_a_run_without_native_modules_warns_once_and_is_the_run_with_them(folder):
    (folder / "without.py").write_text(SCRIPT)
    done = run_script(folder, "without.py", "fit", *TINY, *RUN, "--checkpoint.dirpath=without")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count("moe_lightning: using the slower torch reference") == 1
    assert done.stderr.count("the CPU kernels are not built; with a C++ compiler, run `pip install -e .`") == 1
    run_cli("fit", *RUN, "--checkpoint.dirpath=with")
    without, native = (load_checkpoint(f"{name}/last.ckpt")["state_dict"] for name in ("without", "with"))
    assert without.keys() == native.keys()
    for name, value in native.items():
        assert (value - without[name]).abs().max() <= 1e-6 * max(1, value.abs().max()), name
