"""Runs a build and shows how far it is: `python kernels/build_progress.py pip install -v .`

pip shows nothing of a build, or with -v all of it. Of that this shows ninja's step with the time so far, in one line
that a terminal rewrites, and what the project's CMake files report. Of a build that fails it shows the end.
"""

import queue
import re
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable

STEP = re.compile(r"^\s*(\[\d+/\d+\]) (.*)")
REPORT = re.compile(r"-- moe_lightning: (.*)")
LAST_LINES = 60


def _put_lines(source: Iterable[str], lines: "queue.Queue[str | None]") -> None:
    for line in source:
        lines.put(line)
    lines.put(None)


def _short(step: str) -> str:
    """'Building CUDA object CMakeFiles/_cuda.dir/cuda/select/select.cu.o' without its folders."""
    return re.sub(r"(?:[\w.-]+/)+", "", step)


def run(command: list[str]) -> int:
    """Exit status of the command."""
    began = time.monotonic()
    live = sys.stdout.isatty()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    lines: queue.Queue[str | None] = queue.Queue()
    threading.Thread(target=_put_lines, args=(process.stdout, lines), daemon=True).start()
    last: deque[str] = deque(maxlen=LAST_LINES)
    step, shown = "preparing", ""
    while True:
        try:
            line = lines.get(timeout=1 if live else None)
        except queue.Empty:
            line = ""
        if line is None:
            break
        if line:
            last.append(line)
        if report := REPORT.search(line):
            print(("\r\033[K" if live else "") + report[1], flush=True)
        if match := STEP.match(line):
            step = f"{match[1]} {_short(match[2])}"
        elapsed = f"{time.monotonic() - began:4.0f} s"
        if live:
            print(f"\r\033[K{elapsed}  {step[:100]}", end="", flush=True)
        elif step != shown:
            print(f"{elapsed}  {step}", flush=True)
        shown = step
    status = process.wait()
    print("\r\033[K" if live else "", end="")
    if status:
        print("".join(last), end="")
    print(f"{'built' if status == 0 else 'failed'} after {time.monotonic() - began:.0f} s", flush=True)
    return status


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
