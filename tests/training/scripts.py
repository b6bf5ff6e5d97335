"""Scripts of this repository as processes: by a start of Python, or as forks of one that has imported all they need."""

import contextlib
import multiprocessing
import os
import runpy
import select
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from lightning.fabric.plugins.environments.lightning import find_free_network_port

#: How long what a script has started may take to end after it.
PATIENCE_SECONDS = 10


class CompletedProcess(subprocess.CompletedProcess):
    """With the ranks that outlived it, which are gone by now."""

    left: list[int]


#: No colours, no broken lines.
PLAIN = {"NO_COLOR": "1", "COLUMNS": "200"}


def run_script(folder: Path, *arguments: str, seconds: float = 90) -> CompletedProcess:
    """`python train.py ...` or another script in a session of its own, all of it gone after."""
    process = subprocess.Popen(
        [sys.executable, *arguments],
        cwd=folder,
        env={**os.environ, **PLAIN},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=seconds)
        return CompletedProcess(process.args, process.returncode, out, err)
    finally:
        _kill_session(process.pid)
        process.communicate()


def run_forked(folder: Path, *arguments: str, seconds: float = 90) -> CompletedProcess:
    """The same but for Python's start; ranks that the script starts itself are started as ever."""
    return _run_forks(folder, arguments, seconds, [{}])


def run_forked_ranks(folder: Path, *arguments: str, ranks: int = 2, seconds: float = 90) -> CompletedProcess:
    """As many of the script as torchrun would start; what they print is together, the worst status is theirs."""
    group = {"WORLD_SIZE": str(ranks), "NODE_RANK": "0"}
    group |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(find_free_network_port())}
    each = [{**group, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]
    return _run_forks(folder, arguments, seconds, each)


def _run_forks(
    folder: Path, arguments: tuple[str, ...], seconds: float, environments: list[dict[str, str]]
) -> CompletedProcess:
    context = multiprocessing.get_context("forkserver")
    with tempfile.TemporaryDirectory() as said:
        files = [Path(said, name) for name in ("out", "err")]
        processes = []
        end = time.monotonic() + seconds
        try:
            for own in environments:
                environment = {**os.environ, **PLAIN, **own}
                process = context.Process(target=_become, args=(arguments, str(folder), environment, *map(str, files)))
                process.start()
                processes.append(process)
            for process in processes:
                process.join(max(0, end - time.monotonic()))
            out, err = (file.read_text() for file in files)
            statuses = [process.exitcode for process in processes]
            if None in statuses:
                raise subprocess.TimeoutExpired(arguments, seconds, out, err)
            done = CompletedProcess(arguments, max(statuses, key=abs), out, err)
            done.left = [pid for process in processes for pid in _left_of_session(process.pid)]
            return done
        finally:
            for process in processes:
                _kill_session(process.pid)
                process.join()


def _become(arguments: tuple[str, ...], folder: str, environment: dict[str, str], *files: str) -> None:
    """Turn into `python arguments...`, in a session of its own."""
    os.setsid()
    for number, file in enumerate(files, 1):
        os.dup2(os.open(file, os.O_CREAT | os.O_WRONLY | os.O_APPEND), number)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = list(arguments)
    sys.path.insert(0, str(Path(arguments[0]).parent))
    runpy.run_path(arguments[0], run_name="__main__")


def _left_of_session(session: int) -> list[int]:
    """Processes that do not end soon though the one that started them has."""
    left = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(ProcessLookupError, FileNotFoundError):
            pid = int(stat.parent.name)
            of_session = stat.read_text().rpartition(") ")[2].split()[3] == str(session)
            if of_session and pid != session and not _ends(pid):
                left.append(pid)
    return left


def _ends(pid: int) -> bool:
    """Also of one that nobody has asked for its status yet."""
    process = os.pidfd_open(pid)
    try:
        return bool(select.select([process], [], [], PATIENCE_SECONDS)[0])
    finally:
        os.close(process)


def _kill_session(pid: int) -> None:
    """The group, so that no rank is left behind."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
