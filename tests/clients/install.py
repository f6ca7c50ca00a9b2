"""Installs clients into environments of their own below build/clients: `python -m tests.clients.install [NAME...]`."""

from __future__ import annotations

import subprocess
import sys
import venv
from pathlib import Path

from tests.clients.table import CLIENTS, HOME, NODE


def install(name: str) -> None:
    """Install one client at its pinned version."""
    folder, client = HOME / name, CLIENTS[name]
    folder.mkdir(parents=True, exist_ok=True)
    if client.script.suffix == ".mjs":
        (folder / "package.json").write_text("{}")
        subprocess.run(
            ["npm", "install", "--silent", "--no-audit", "--no-fund", *client.packages], cwd=folder, check=True
        )
        return
    venv.create(folder, with_pip=True)
    pip: list[str | Path] = [folder / "bin" / "python", "-m", "pip", "install", "--quiet"]
    subprocess.run([*pip, *client.packages], check=True)


if __name__ == "__main__":
    for name in sys.argv[1:] or [name for name in CLIENTS if NODE or CLIENTS[name].script.suffix == ".py"]:
        print(f"Installing {name}: {', '.join(CLIENTS[name].packages)}", flush=True)
        install(name)
