"""Set-up: which CUDA architectures are built, and what is shown while they are."""

import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PROGRESS = [sys.executable, str(ROOT / "kernels" / "build_progress.py")]
PROBE = f"""
include({ROOT}/kernels/cuda_archs.cmake)
moe_cuda_archs(archs reason)
message("archs=${{archs}} reason=${{reason}}")
"""


def configure(folder: Path, *options: str, nvidia_smi: str = "exit 9") -> subprocess.CompletedProcess:
    """What CMake chooses on a machine where `nvidia-smi` does this."""
    (folder / "probe.cmake").write_text(PROBE)
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{nvidia_smi}\n")
    program.chmod(0o755)
    environment = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}"}
    return subprocess.run(
        ["cmake", *options, "-P", "probe.cmake"], cwd=folder, env=environment, capture_output=True, text=True
    )


@pytest.mark.parametrize(
    ("capabilities", "archs"),
    [
        (r"9.0", "90a"),
        (r"8.0", "80"),
        (r"8.9\n8.6", "80"),
        (r"9.0\n9.0\n8.0", "80;90a"),
        (r"10.0", "80"),  # by its PTX
        (r"12.0", "80"),
    ],
)
def test_auto_builds_for_the_gpus_it_sees(tmp_path, capabilities, archs):
    done = configure(tmp_path, nvidia_smi=f'printf "{capabilities}\\n"')
    assert f"archs={archs} " in done.stderr


@pytest.mark.skipif(os.path.exists("/dev/nvidiactl") or os.path.exists("/dev/dxg"), reason="has a GPU that torch sees")
def test_auto_builds_nothing_where_there_is_no_gpu(tmp_path):
    done = configure(tmp_path)
    assert "archs= reason=MOE_CUDA=AUTO sees no GPU; MOE_CUDA=ON builds them all the same" in done.stderr


def test_auto_names_a_gpu_that_is_too_old(tmp_path):
    done = configure(tmp_path, nvidia_smi="echo 7.5")
    assert "archs= reason=they need compute capability 8.0, this machine has 7.5" in done.stderr


def test_on_builds_all_and_off_none(tmp_path):
    assert "archs=80;90a " in configure(tmp_path, "-DMOE_CUDA=ON").stderr
    assert "archs= reason=MOE_CUDA=OFF" in configure(tmp_path, "-DMOE_CUDA=OFF", nvidia_smi="echo 9.0").stderr
    assert "archs=90a " in configure(tmp_path, "-DMOE_CUDA=ON", "-DMOE_CUDA_ARCHS=90a").stderr
    wrong = configure(tmp_path, "-DMOE_CUDA=yes")
    assert wrong.returncode != 0
    assert "MOE_CUDA must be AUTO, ON or OFF, got yes" in wrong.stderr


BUILD = """
import sys
print("Processing /work")
print("  -- moe_lightning: CUDA kernels OFF (MOE_CUDA=OFF); CPU kernels only")
print("  -- Configuring done")
for n in (1, 2):
    print(f"  [{n}/2] Building CUDA object CMakeFiles/_cuda.dir/cuda/select/select_{n}.cu.o")
print("Successfully built" if len(sys.argv) == 1 else "nvcc: the last words")
sys.exit(len(sys.argv) - 1)
"""


def test_a_build_shows_its_steps():
    done = subprocess.run([*PROGRESS, sys.executable, "-c", BUILD], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert [re.sub(r"^ *\d+ s  ", "", line) for line in lines[:-1]] == [
        "preparing",
        "CUDA kernels OFF (MOE_CUDA=OFF); CPU kernels only",
        "[1/2] Building CUDA object select_1.cu.o",
        "[2/2] Building CUDA object select_2.cu.o",
    ]
    assert re.fullmatch(r"built after \d+ s", lines[-1])


def test_a_build_that_fails_shows_its_end_and_its_status():
    done = subprocess.run([*PROGRESS, sys.executable, "-c", BUILD, "fail"], capture_output=True, text=True)
    assert done.returncode == 1
    assert "  [1/2] Building CUDA object CMakeFiles/_cuda.dir/cuda/select/select_1.cu.o\n" in done.stdout
    assert "nvcc: the last words" in done.stdout
    assert re.fullmatch(r"failed after \d+ s", done.stdout.splitlines()[-1])


def test_a_terminal_sees_one_line_that_is_rewritten():
    reader, writer = pty.openpty()
    process = subprocess.Popen([*PROGRESS, sys.executable, "-c", BUILD], stdout=writer)
    os.close(writer)
    shown = b""
    try:
        while piece := os.read(reader, 4096):
            shown += piece
    except OSError:  # the end of a pseudo-terminal
        pass
    os.close(reader)
    assert process.wait() == 0
    text = shown.decode()
    assert re.search(r"\r\033\[K +\d+ s  \[2/2\] Building CUDA object select_2\.cu\.o", text)
    assert text.count("\n") == 2  # the report of CMake's files, and the last line
