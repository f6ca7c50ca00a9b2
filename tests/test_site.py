"""The pages build as a site without a warning, with every page in it, and without code or fonts of other hosts."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_the_site_builds_strictly(tmp_path: Path) -> None:
    command = (sys.executable, ROOT / "docs/build_site.py", tmp_path)
    built = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    for page in pages:
        path = page.relative_to(ROOT)
        html = tmp_path / (path.parent if path.name == "README.md" else path.with_suffix("")) / "index.html"
        assert html.is_file(), path
        fetched = re.findall(r'<(?:script|link|img)[^>]* (?:src|href)="?(https?:[^" >]+)', html.read_text())
        assert not fetched, f"{path} fetches {fetched}"
    assert '<pre class="mermaid">' in (tmp_path / "ARCHITECTURE/index.html").read_text()
