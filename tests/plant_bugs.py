"""Plants bugs one at a time in a copy of the repository and counts which ones the tests catch.

    python tests/plant_bugs.py [--only TEXT] [--jobs N]

A developer's tool: minutes per core, not part of CI. `BUGS` is the list: file, old text, new text, the tests that must
fail. A text that is no longer in its file is an error, so that the list follows the code.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from planted_bugs_list import BUGS, Bug
from rich.progress import Progress

ROOT = Path(__file__).resolve().parent.parent
COPIED = ("moe_lightning", "tests", "configs", "train.py", "pyproject.toml")


class Outcome(NamedTuple):
    bug: Bug
    caught: bool
    last_line: str


def copy_of_repository(folder: Path) -> None:
    """What the tests need, native modules included."""
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, folder / name)
    (folder / "sitecustomize.py").write_text(SITE)


#: For each Python that starts in the copy: an editable install would bring in the repository itself.
SITE = """import sys
sys.meta_path[:] = [finder for finder in sys.meta_path if not type(finder).__module__.startswith("_editable_")]
"""


def native_modules() -> list[Path]:
    """Of an editable install they lie beside the environment's packages, not in the repository."""
    import moe_lightning

    return [path for folder in moe_lightning.__path__ for path in Path(folder).glob("_c*.so")]


def plant(bug: Bug) -> Outcome:
    """Run the bug's tests against a copy that has it."""
    with tempfile.TemporaryDirectory(prefix="planted-") as name:
        folder = Path(name)
        copy_of_repository(folder)
        for module in native_modules():
            if not (folder / "moe_lightning" / module.name).exists():
                shutil.copy(module, folder / "moe_lightning")
        path = folder / bug.file
        text = path.read_text()
        if text.count(bug.old) != 1:
            raise ValueError(f"plant_bugs: {bug.file} must hold this text once, got {text.count(bug.old)}: {bug.old!r}")
        path.write_text(text.replace(bug.old, bug.new))
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-n", "0", "-p", "no:cacheprovider", *bug.tests.split()]
        environment = {**os.environ, "PYTHONPATH": name}
        run = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        # 1: a test failed. 2 and more: nothing ran as it should, which is no catch.
        last = (run.stdout.strip().splitlines() or [run.stderr.strip()[-200:]])[-1]
        return Outcome(bug, run.returncode == 1, last)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="bugs whose file or text holds this")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    flags = parser.parse_args()
    bugs = [bug for bug in BUGS if flags.only in f"{bug.file} {bug.old} {bug.new}"]
    missed = []
    with Progress() as progress, ThreadPoolExecutor(flags.jobs) as pool:
        task = progress.add_task("planting", total=len(bugs))
        for outcome in pool.map(plant, bugs):
            progress.advance(task)
            if not outcome.caught:
                missed.append(outcome)
                bug = outcome.bug
                progress.print(f"not caught: {bug.file}: {bug.old!r} -> {bug.new!r} ({outcome.last_line})")
    print(f"{len(bugs) - len(missed)} of {len(bugs)} caught")
    raise SystemExit(bool(missed))


if __name__ == "__main__":
    main()
