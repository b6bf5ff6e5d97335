"""Records: of what commit they are, and where one of changed code may not be written."""

import json
import subprocess
from pathlib import Path

import pytest

from moe_lightning.bench.__main__ import COMMANDS, main
from moe_lightning.bench.record import write_record
from moe_lightning.utils import provenance


@pytest.fixture
def said(monkeypatch):
    """Set what the environment says of a copy."""

    def say(**variables):
        for name in ("GIT_COMMIT", "GIT_DIRTY"):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return say


@pytest.fixture
def repository(tmp_path, monkeypatch, said):
    """A checkout with a package and a record, in which provenance finds itself."""
    said()
    root = tmp_path / "checkout"
    for name in ("package/code.py", "docs/benchmarks/r.json"):
        (root / name).parent.mkdir(parents=True)
        (root / name).write_text("old")
    monkeypatch.setattr(provenance, "__file__", str(root / "package" / "provenance.py"))

    def git(*arguments):
        who = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", *who, *arguments], cwd=root, check=True, capture_output=True)

    git("init")
    git("add", ".")
    git("commit", "-m", "first")
    return root


def test_changed_code_makes_no_published_record(repository):
    published, elsewhere = repository / "docs" / "benchmarks" / "r.json", repository / "r.json"
    write_record(published, "ops", [1])
    assert json.loads(published.read_text())["commit"]["dirty"] is False
    write_record(published, "ops", [2])  # that the first was written does not change the code
    (repository / "package" / "code.py").write_text("new")
    before = published.read_text()
    with pytest.raises(ValueError, match=r"bench.ops: a record in docs/benchmarks must be of a commit without changes, "
                       r"got \w{7} with changes; commit them, or write the record elsewhere"):  # fmt: skip
        write_record(published, "ops", [3])
    assert published.read_text() == before
    write_record(elsewhere, "ops", [4])
    assert json.loads(elsewhere.read_text())["commit"]["dirty"] is True


@pytest.mark.parametrize(
    ("variables", "dirty", "rule"),
    [
        ({"GIT_COMMIT": "abc", "GIT_DIRTY": "0"}, False, None),
        ({"GIT_COMMIT": "abc"}, None, "got GIT_COMMIT=abc alone; set GIT_DIRTY=0 too if the copy has no changes"),
        ({"GIT_COMMIT": "abc", "GIT_DIRTY": "no"}, None, "got GIT_COMMIT=abc alone"),
        ({"GIT_COMMIT": "abc", "GIT_DIRTY": "1"}, True, "got abc with changes"),
    ],
)
def test_a_copy_says_whether_it_has_changes(variables, dirty, rule, said, tmp_path):
    said(**variables)
    assert provenance.commit() == {"id": "abc", "dirty": dirty}
    path = tmp_path / "docs" / "benchmarks" / "r.json"
    if rule is None:
        write_record(path, "ops", [])
        assert path.exists()
    else:
        with pytest.raises(ValueError, match=rule):
            write_record(path, "ops", [])
        assert not path.parent.exists()


def test_without_a_commit_nothing_is_published(said, tmp_path, monkeypatch):
    said()
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "provenance.py"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert provenance.commit() == {"id": None, "dirty": None}
    with pytest.raises(ValueError, match="got no commit; run in a git checkout, or set GIT_COMMIT=ID GIT_DIRTY=0"):
        write_record(tmp_path / "docs" / "benchmarks" / "r.json", "ops", [])


def test_published_records_are_of_unchanged_code():
    """Those from before the rule may not know."""
    for path in (Path(__file__).parents[2] / "docs/benchmarks").glob("*.json"):
        record = json.loads(path.read_text())
        assert record["commit"]["dirty"] is False or record["date"] < "2026-11-30", path


@pytest.mark.parametrize("command", [name for name in COMMANDS if name != "trace"])
def test_every_command_refuses_before_it_measures(command, said, tmp_path, capsys):
    said(GIT_COMMIT="abc", GIT_DIRTY="1")
    path = str(tmp_path / "docs" / "benchmarks" / "r.json")
    needed = ["--ep", "none.json", "--link", "none.json"] if command == "scale" else []
    assert main([command, *needed, "--json", path]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"bench.{command}: a record in docs/benchmarks must be of a commit without changes")
    assert error.count("\n") == 1
