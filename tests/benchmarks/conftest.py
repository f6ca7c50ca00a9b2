"""The scripts of `benchmarks/`, imported as they import each other."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="session")
def script() -> Iterator[Callable[[str], ModuleType]]:
    """`script("engine")`: benchmarks/engine.py as a module."""
    before = set(sys.modules)
    sys.path.insert(0, str(FOLDER))

    def load(name: str) -> ModuleType:
        if name != "kernels":
            return importlib.import_module(name)
        # Transformers looks for a module of this name, and finds a folder of this repository.
        spec = importlib.util.spec_from_file_location("kernels_benchmark", FOLDER / "kernels.py")
        assert spec is not None
        assert spec.loader is not None
        module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    yield load
    sys.path.remove(str(FOLDER))
    for name in {"kernels_benchmark", *(path.stem for path in FOLDER.glob("*.py"))} - before:
        sys.modules.pop(name, None)
