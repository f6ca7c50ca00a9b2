"""Builds the pages as a site: `make site`. The build fetches nothing; browsers load mermaid from its CDN.

mkdocs takes pages from one folder, while ours link to files all over the repository. So the pages, and every file that
they link to, are copied to one folder first, each at its own path.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build"
LINK = re.compile(r"\]\((?!https?:|#)([^)#\s]+)")


def pages() -> list[Path]:
    return sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])


def gather(folder: Path) -> None:
    """Copy the pages and the files that they link to into `folder`."""
    for page in pages():
        linked = {(page.parent / target).resolve() for target in LINK.findall(page.read_text())}
        for file in filter(Path.is_file, {page, *linked}):  # mkdocs says which link leads nowhere
            copy = folder / file.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, copy)


def main(arguments: list[str]) -> int:
    """Build into the folder named, or `build/site`; a page that mkdocs warns of fails the build."""
    site = Path(arguments[0]).resolve() if arguments else BUILD / "site"
    # mkdocs.yml names this folder.
    gathered = BUILD / "pages"
    shutil.rmtree(gathered, ignore_errors=True)
    gather(gathered)
    mkdocs = Path(sys.executable).with_name("mkdocs")
    command = (mkdocs, "build", "--strict", "--config-file", ROOT / "mkdocs.yml", "--site-dir", site)
    # Material warns of a next mkdocs at each build.
    return subprocess.run(command, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
