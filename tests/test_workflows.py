"""Workflows run what a person runs, on the Pythons that are supported; a release says what CHANGELOG.md says."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.test_repository import PROJECT, ROOT, make_targets

WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
SCRIPT = ROOT / ".github/scripts/release_notes.py"


def read(path: Path) -> dict[Any, Any]:
    loaded: dict[Any, Any] = yaml.safe_load(path.read_text())
    return loaded


def steps(path: Path) -> Iterator[dict[str, Any]]:
    for job in read(path)["jobs"].values():
        yield from job["steps"]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_they_run_make_targets_that_exist(path: Path) -> None:
    commands = [step["run"] for step in steps(path) if "run" in step]
    named = {target for command in commands for target in re.findall(r"make (\w+)", command)}
    assert named
    assert named <= make_targets()


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_they_can_only_read_unless_they_publish(path: Path) -> None:
    workflow = read(path)
    assert workflow["permissions"] == {"contents": "read"}
    writing = [name for name, job in workflow["jobs"].items() if "permissions" in job]
    assert writing == (["publish"] if path.stem == "release" else [])


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_no_shell_runs_what_somebody_else_wrote(path: Path) -> None:
    """An expression is pasted into a script before the shell reads it; a variable of the environment is not."""
    assert [step["run"] for step in steps(path) if "${{" in step.get("run", "")] == []


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_actions_have_a_version(path: Path) -> None:
    used = [step["uses"] for step in steps(path) if "uses" in step]
    assert all(re.fullmatch(r"\./\.github/actions/\w+|actions/[\w-]+@v\d+", each) for each in used), used


def test_all_parts_of_the_tests_run_for_each_change() -> None:
    commands = " ".join(step["run"] for step in steps(ROOT / ".github/workflows/ci.yml") if "run" in step)
    assert {"lint", "types", "quick", "slow", "ray"} <= set(re.findall(r"make (\w+)", commands))


def test_pythons_are_those_that_the_package_names() -> None:
    prefix = "Programming Language :: Python :: "
    named = [each.removeprefix(prefix) for each in PROJECT["classifiers"] if each.startswith(prefix)]
    assert read(ROOT / ".github/workflows/ci.yml")["jobs"]["quick"]["strategy"]["matrix"]["python"] == named
    assert PROJECT["requires-python"] == f">={named[0]}"


def notes(folder: Path, tag: str, changelog: str) -> subprocess.CompletedProcess[str]:
    """The script in a repository with that changelog and this project's version."""
    script = folder / ".github/scripts" / SCRIPT.name
    script.parent.mkdir(parents=True)
    script.write_bytes(SCRIPT.read_bytes())
    (folder / "pyproject.toml").write_text(f'[project]\nversion = "{PROJECT["version"]}"\n')
    (folder / "CHANGELOG.md").write_text(changelog)
    return subprocess.run([sys.executable, script, tag], capture_output=True, text=True, check=False)


def test_a_release_says_what_the_changelog_says_of_it(tmp_path: Path) -> None:
    version = PROJECT["version"]
    text = f"## [Unreleased]\n\n- c\n\n## [{version}] - 2030-01-01\n\n### Added\n\n- b\n\n## [0.0.1]\n\n- a\n"
    made = notes(tmp_path, f"v{version}", text)
    assert (made.returncode, made.stdout) == (0, "### Added\n\n- b\n")


@pytest.mark.parametrize(
    ("tag", "changelog", "message"),
    [
        ("v9.9.9", "## [9.9.9]\n\n- a\n", "so the tag must be v"),
        (f"v{PROJECT['version']}", "## [Unreleased]\n\n- a\n", "rename its 'Unreleased' heading"),
        (f"v{PROJECT['version']}", f"## [{PROJECT['version']}]\n\n## [0.0.1]\n\n- a\n", "has nothing under"),
    ],
    ids=["another_version", "unreleased", "empty"],
)
def test_a_release_that_does_not_agree_is_refused(tmp_path: Path, tag: str, changelog: str, message: str) -> None:
    made = notes(tmp_path, tag, changelog)
    assert (made.returncode, made.stdout) == (1, "")
    assert message in made.stderr
