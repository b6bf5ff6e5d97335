"""How much memory there is for this process, whoever limits it, and what is refused beforehand."""

import resource
from pathlib import Path

import pytest
import torch
from tiny_models import make_moe

from moe_lightning.models import MLP, MLPDecoder
from moe_lightning.utils import memory
from moe_lightning.utils.memory import HostMemory, check_step_fits, host_memory

MIB = 1 << 20


def cgroup(tmp_path, monkeypatch, own: str, files: dict[str, str]) -> None:
    """A host of which this process sees these files under /sys/fs/cgroup."""
    for name, content in files.items():
        path = tmp_path / "cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    (tmp_path / "own").write_text(own)
    monkeypatch.setattr(memory, "_CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(memory, "_OWN_CGROUPS", tmp_path / "own")


def v2(folder: str, limit: str, used: int, cache: int = 0) -> dict[str, str]:
    return {
        f"{folder}/memory.max": f"{limit}\n",
        f"{folder}/memory.current": f"{used}\n",
        f"{folder}/memory.stat": f"anon 1\nfile 9\ninactive_file {cache}\n",
    }


def v1(folder: str, limit: int, used: int, cache: int = 0) -> dict[str, str]:
    return {
        f"memory/{folder}/memory.limit_in_bytes": f"{limit}\n",
        f"memory/{folder}/memory.usage_in_bytes": f"{used}\n",
        f"memory/{folder}/memory.stat": f"cache 3\ninactive_file 5\ntotal_inactive_file {cache}\n",
    }


@pytest.mark.parametrize(
    ("own", "files"),
    [
        ("0::/\n", v2(".", str(64 * MIB), 9 * MIB, 2 * MIB)),
        ("0::/job/step\n", {**v2("job", str(64 * MIB), 9 * MIB, 2 * MIB), **v2("job/step", "max", 5 * MIB)}),
        ("0::/job/step\n", {**v2("job", str(640 * MIB), 9 * MIB), **v2("job/step", str(64 * MIB), 9 * MIB, 2 * MIB)}),
        ("0::/seen/from/outside\n", v2(".", str(64 * MIB), 9 * MIB, 2 * MIB)),
        ("9:cpu:/\n4:hugetlb,memory:/job\n0::/\n", v1("job", 64 * MIB, 9 * MIB, 2 * MIB)),
        ("4:memory:/docker/a\n", {**v1(".", 64 * MIB, 9 * MIB, 2 * MIB)}),
        ("4:memory:/job\n", {**v1(".", 9223372036854771712, 0), **v1("job", 64 * MIB, 9 * MIB, 2 * MIB)}),
    ],
    ids=["v2", "v2 above", "v2 below", "v2 namespace", "v1", "v1 container", "v1 unlimited root"],
)
def test_the_cgroups_limit_counts_not_the_machines(tmp_path, monkeypatch, own, files):
    cgroup(tmp_path, monkeypatch, own, files)
    assert host_memory() == HostMemory(64 * MIB, 7 * MIB, "the limit of this cgroup")
    assert str(host_memory()) == "0.00734 GB of 0.0671 GB in use (the limit of this cgroup)"


@pytest.mark.parametrize(
    ("own", "files"), [("0::/\n", v2(".", "max", 5)), ("4:memory:/\n", v1(".", 1 << 62, 5)), ("0::/\n", {})]
)
def test_without_a_limit_it_is_the_machines(tmp_path, monkeypatch, own, files):
    cgroup(tmp_path, monkeypatch, own, files)
    total = int(Path("/proc/meminfo").read_text().split()[1]) * 1024
    assert (host_memory().limit, host_memory().source) == (total, "this machine's memory")
    assert 0 < host_memory().used < total


def test_a_limit_on_the_process_counts_too(tmp_path, monkeypatch):
    cgroup(tmp_path, monkeypatch, "", {})
    before = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + 512 * MIB
    resource.setrlimit(resource.RLIMIT_AS, (limit, before[1]))
    try:
        assert (host_memory().limit, host_memory().source) == (limit, "the limit of this process, ulimit -v")
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.fixture
def little(monkeypatch):
    monkeypatch.setattr(memory, "host_memory", lambda: HostMemory(2_000_000, 0, "the limit of this cgroup"))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (
            lambda: make_moe(d_model=4096),
            "decoder_moe: the weights must fit in memory, 0.002 GB (the limit of this cgroup)",
        ),
        (lambda: MLPDecoder(64, 1024), "mlp: the weights must fit in memory, 0.002 GB (the limit of this cgroup), got"),
        (
            lambda: MLP(1000),
            "mlp: the weights must fit in memory, 0.002 GB (the limit of this cgroup), got 0.008 GB from hidden=1000; "
            "make them smaller",
        ),
    ],
)
def test_weights_beyond_the_limit_are_refused(little, make, says):
    with pytest.raises(ValueError, match="must fit in memory") as error:
        make()
    assert str(error.value).startswith(says)
    with torch.device("meta"):
        make()


def test_a_step_beyond_the_limit_is_refused(little):
    check_step_fits(weights=250_000, logits=125_000, batch="")  # 4 x 250,000 + 8 x 125,000 bytes are the limit
    for weights, logits, ranks in ((250_001, 125_000, 1), (250_000, 125_001, 1), (125_001, 62_500, 2)):
        with pytest.raises(
            ValueError, match=r"^memory: a training step must fit in 0\.002 GB \(the limit of this cgroup"
        ):
            check_step_fits(weights, logits, "", ranks)
