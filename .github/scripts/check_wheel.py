"""Imports all modules of the wheel and checks its configs. Run it by the Python into which the wheel is installed."""

from __future__ import annotations

import importlib
import importlib.metadata
import subprocess
import sys
from pathlib import Path

FLOORS = ("adapter_store", "cluster", "deploy", "kernels", "workers")


def main() -> None:
    """Fail at the first thing that is missing."""
    files = importlib.metadata.files("lorafleet") or []
    names = {str(file) for file in files}
    missing = [floor for floor in FLOORS if f"lorafleet/{floor}/py.typed" not in names]
    assert not missing, f"no py.typed in {missing}"
    modules = sorted(name for name in names if name.startswith("lorafleet/") and name.endswith(".py"))
    for name in modules:
        if name.endswith("migrations/env.py"):
            continue  # alembic runs it, within a migration
        module = importlib.import_module(name.removesuffix(".py").removesuffix("/__init__").replace("/", "."))
        assert Path(module.__file__ or "").is_relative_to(sys.prefix), f"{module.__name__} came from {module.__file__}"
    configs = [str(file.locate()) for file in files if file.match("lorafleet/deploy/serve/*.yaml")]
    assert configs, "no Serve config"
    subprocess.run([sys.executable, "-m", "lorafleet.deploy.validate", *configs], check=True)
    print(f"{len(modules)} modules of the wheel import")


if __name__ == "__main__":
    main()
