"""Prints a version's part of CHANGELOG.md: `release_notes.py v1.2.3`. A tag of another version is refused."""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def notes(tag: str, changelog: str, version: str) -> str:
    """Text below the version's heading; ValueError if the tag, pyproject.toml and CHANGELOG.md do not agree."""
    if tag != f"v{version}":
        raise ValueError(f"tag {tag}: pyproject.toml has version {version}, so the tag must be v{version}")
    found = re.search(rf"^## \[{re.escape(version)}\][^\n]*\n(.*?)(?=^## \[|\Z)", changelog, re.MULTILINE | re.DOTALL)
    text = found[1].strip() if found else ""
    if not text:
        raise ValueError(f"CHANGELOG.md has nothing under '## [{version}]': rename its 'Unreleased' heading first")
    return text


def main() -> int:
    """Print the notes, or what is wrong."""
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    try:
        print(notes(sys.argv[1], (ROOT / "CHANGELOG.md").read_text(), version))
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
