"""What `make` installs is pinned by hash, and is all that the project says it needs."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
PIN = re.compile(r"^([\w.-]+)==([\w.]+)(?: ; .*)?$")
SHA256 = re.compile(r"^--hash=sha256:[0-9a-f]{64}$")


def pins(text: str) -> dict[str, str]:
    """Version of each package, by canonical name; ValueError where one has none, or no hash."""
    found = {}
    lines = re.sub(r"^#.*\n", "", text, flags=re.M).replace("\\\n", " ").splitlines()
    for line in lines:
        requirement, *hashes = re.split(r"\s+(?=--hash)", line.strip())
        match = PIN.match(requirement)
        if match is None or not hashes or not all(SHA256.match(value) for value in hashes):
            raise ValueError(f"pins: {line[:60]!r} must have a version and sha256 hashes")
        found[canonicalize_name(match[1])] = match[2]
    return found


def test_every_requirement_is_pinned_by_hash_but_torch_whose_build_is_the_machines():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extras = project["project"]["optional-dependencies"]
    trained_with = pins((ROOT / "hashes.txt").read_text())
    trained_with["torch"] = (ROOT / "torch.txt").read_text().strip().removeprefix("torch==")
    tested_with = pins((ROOT / "hashes-dev.txt").read_text())
    for pinned, needed in (
        (trained_with, project["project"]["dependencies"]),
        (trained_with, project["build-system"]["requires"]),
        *((trained_with, extra) for name, extra in extras.items() if name != "dev"),
        (tested_with, [need for need in extras["dev"] if not need.startswith(project["project"]["name"])]),
    ):
        for requirement in map(Requirement, needed):
            version = pinned[canonicalize_name(requirement.name)]
            assert requirement.specifier.contains(version), (str(requirement), version)
    assert not trained_with.keys() & tested_with.keys()


def test_dev_has_every_extra():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(Requirement(extras["dev"][0]).extras) == set(extras) - {"dev"}


def test_a_pin_without_a_hash_is_seen():
    sha = f"--hash=sha256:{'0' * 64}"
    assert pins(
        f"# a comment\na==1 \\\n    {sha} \\\n    {sha}\nb-c==2.0 ; sys_platform == 'win32' \\\n    {sha}\n"
    ) == {
        "a": "1",
        "b-c": "2.0",
    }
    for text in ("a==1\n", f"a>=1 {sha}\n", f"a==1 {sha[:-1]}\n"):
        with pytest.raises(ValueError, match="must have a version and sha256"):
            pins(text)
