"""What the pages say is there: commands, files, links, metrics, versions; and nothing speaks of one machine."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from lorafleet.deploy.validate import check_file

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
DECISION = ("Context", "Decision", "What was measured", "Consequences")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def constraints() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if "==" in line)


def tracked() -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return [path for name in listed.stdout.splitlines() if (path := ROOT / name).is_file()]


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


@pytest.fixture(scope="module")
def generate() -> Iterator[ModuleType]:
    """docs/generate.py."""
    sys.path.insert(0, str(ROOT / "docs"))
    import generate as module  # type: ignore[import-not-found]

    yield module
    sys.path.remove(str(ROOT / "docs"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_make_commands_exist(page: Path) -> None:
    said = set(re.findall(r"(?<![\w-])make((?: [a-z]+)+)(?=[`\s]|$)", "\n".join(_code(page.read_text()))))
    named = {target for words in said for target in words.split()}
    assert named <= make_targets()


def _code(text: str) -> Iterator[str]:
    """What stands in code blocks and between backticks, without a shell's comments."""
    for block in re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        yield from (line.partition("#")[0] for line in block.splitlines())
    yield from re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", page.read_text()):
        file, _, anchor = target.partition("#")
        linked = page.parent / file if file else page
        assert linked.exists(), f"{page.name} links to {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", linked.read_text(), re.MULTILINE)
            slugs = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in slugs, f"{page.name} links to {target}"


def test_architecture_names_files_that_exist() -> None:
    """`folder/file.py` is there, and a bare `file.py` lies on some floor."""
    text = (ROOT / "ARCHITECTURE.md").read_text()
    names = {path.name for path in tracked()}
    for name in re.findall(r"`([\w/]+\.(?:py|yaml|json|toml))`", text):
        assert (ROOT / name).is_file() if "/" in name else name in names, f"ARCHITECTURE.md speaks of {name}"


def rooms() -> dict[str, list[str]]:
    """ARCHITECTURE.md's tree: folder -> modules that it names there."""
    text = (ROOT / "ARCHITECTURE.md").read_text()
    (tree,) = re.findall(r"hold this tree.*?^```\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    found: dict[str, list[str]] = {}
    floor = folder = ""
    for indent, name, modules in re.findall(r"^( *)(?:([a-z_/]+)/ +)?(.*)$", tree, re.MULTILINE):
        if name:
            folder = f"{floor}/{name}" if indent else name
            floor = floor if indent else name
        found.setdefault(folder, []).extend(modules.split())
    return {folder: modules for folder, modules in found.items() if modules}


def test_architecture_names_every_room_and_only_modules_that_exist() -> None:
    named = rooms()
    floors = {folder for folder in named if "/" not in folder}
    modules = {path.relative_to(ROOT) for path in tracked() if path.suffix == ".py"}
    folders = {str(path.parent) for path in modules if path.parts[0] in floors and len(path.parts) > 1}
    assert floors == {"adapter_store", "cluster", "deploy", "kernels", "workers"}
    assert named.keys() == folders, "ARCHITECTURE.md's rooms are not the folders of the tree"
    gone = [
        f"{folder}/{name}.py"
        for folder in named
        for name in named[folder]
        if not (ROOT / folder / f"{name}.py").is_file()
    ]
    assert not gone, f"ARCHITECTURE.md's rooms name modules that are not there: {gone}"


def test_every_decision_has_its_parts_and_is_in_the_index() -> None:
    folder = ROOT / "docs/decisions"
    pages = sorted(folder.glob("[0-9]*.md"))
    index = (folder / "README.md").read_text()
    assert [int(page.name[:2]) for page in pages] == list(range(1, len(pages) + 1))
    for page in pages:
        ((number, title),) = re.findall(r"\A# (\d+)\. (.*)\n", page.read_text())
        assert int(number) == int(page.name[:2])
        assert f"| {number} | [{title}]({page.name}) |" in index
        parts = re.findall(r"^\*\*([\w ]+)\.\*\*", page.read_text(), re.MULTILINE)
        assert [part for part in parts if part in DECISION] == list(DECISION), page.name


def test_docs_are_current(generate: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate.main(["--check"]) == 0, capsys.readouterr().out


def test_dashboard_queries_metrics_that_exist(generate: ModuleType) -> None:
    dashboard = json.loads((ROOT / "deploy/grafana/lorafleet.json").read_text())
    metrics = generate.metric_names()
    exported: dict[str, set[str]] = {}
    for name, metric in metrics.items():
        labels = set(metric.info["tag_keys"])
        is_histogram = type(metric).__name__ == "Histogram"
        for ending in ("_bucket", "_sum", "_count") if is_histogram else ("",):
            exported[name + ending] = labels | ({"le"} if is_histogram else set())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", ())]
    queries += [variable["definition"] for variable in dashboard["templating"]["list"] if "definition" in variable]
    seen = set()
    for query in queries:
        used = set(re.findall(r"ray_lorafleet_\w+", query))
        assert used, query
        assert used <= exported.keys(), query
        labels = set(re.findall(r"(\w+)=~", query))
        labels |= {name.strip() for names in re.findall(r"by \(([^)]*)\)", query) for name in names.split(",")}
        assert all(labels <= exported[name] for name in used), query
        seen |= {re.sub(r"_(bucket|sum|count)$", "", name) if name not in metrics else name for name in used}
    assert seen == metrics.keys(), f"not on the dashboard: {metrics.keys() - seen}"


def test_dashboard_panels_do_not_overlap() -> None:
    panels = json.loads((ROOT / "deploy/grafana/lorafleet.json").read_text())["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for place in (panel["gridPos"] for panel in panels):
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not taken & cells
        assert max(x for x, _ in cells) < 24
        taken |= cells


@pytest.mark.parametrize("path", sorted((ROOT / "deploy").rglob("*.yaml")), ids=lambda path: path.name)
def test_serve_configs_deploy(path: Path) -> None:
    checked = check_file(path)
    assert checked.applications == ("lorafleet",)
    assert all("is bound to" in warning for warning in checked.warnings)


@pytest.mark.parametrize("name", ["rayservice.yaml", "rayservice-tp.yaml"])
def test_kuberay_manifest_fits_the_image_and_itself(name: str) -> None:
    documents = {each["kind"]: each for each in yaml.safe_load_all((ROOT / "deploy/kuberay" / name).read_text())}
    spec = documents["RayService"]["spec"]
    (application,) = yaml.safe_load(spec["serveConfigV2"])["applications"]
    cluster = spec["rayClusterConfig"]
    assert cluster["rayVersion"] == constraints()["ray"]
    (group,) = cluster["workerGroupSpecs"]
    worker = application["args"]["worker"]
    assert group["replicas"] >= worker["num_replicas"], "each worker needs a node of its own GPUs"
    (limits,) = (one["resources"]["limits"] for one in group["template"]["spec"]["containers"])
    assert int(limits["nvidia.com/gpu"]) == worker["num_gpus"] == worker.get("tensor_parallel_size", 1)
    assert group["template"]["spec"]["terminationGracePeriodSeconds"] > worker.get("drain_s", 600)
    for template in (cluster["headGroupSpec"]["template"], group["template"]):
        (container,) = template["spec"]["containers"]
        assert template["spec"]["securityContext"]["fsGroup"] == image_user(), "the volume belongs to root at first"
        assert container["image"] == f"lorafleet:{PROJECT['version']}"
        volumes = {volume["name"] for volume in template["spec"]["volumes"]}
        mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        assert mounts.keys() == volumes
        assert mounts["state"] == application["args"]["adapters"]["state_dir"]
        assert "LORAFLEET_ADMIN_TOKEN" in {variable["name"] for variable in container["env"]}
    claim = documents["PersistentVolumeClaim"]
    assert claim["metadata"]["name"] == "lorafleet-state"
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]


def image_user() -> int:
    lines = (ROOT / "deploy/docker/Dockerfile").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("USER"))


def test_image_has_all_floors_and_a_python_that_is_supported() -> None:
    lines = (ROOT / "deploy/docker/Dockerfile").read_text().splitlines()
    copied = {line.split()[1] for line in lines if line.startswith("COPY") and len(line.split()) == 3}
    assert {"adapter_store", "cluster", "deploy", "kernels", "workers", "examples/demo"} <= copied
    (base,) = (line.split()[1] for line in lines if line.startswith("FROM"))
    minor = int(re.fullmatch(r"python:3\.(\d+)-\S+", base)[1])  # type: ignore[index]
    assert minor >= int(PROJECT["requires-python"].removeprefix(">=3."))
    (command,) = (json.loads(line.removeprefix("CMD ")) for line in lines if line.startswith("CMD "))
    assert command[:2] == ["serve", "run"]
    assert (ROOT / command[2]).is_file()


def test_precommit_runs_what_the_set_up_installs() -> None:
    (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert repository["repo"] == "local"
    for hook in repository["hooks"]:
        assert hook["language"] == "system", "nothing is fetched"
        (tool,) = (Path(word).name for word in hook["entry"].split() if word.startswith(".venv/bin/"))
        assert Path(sys.executable).with_name(tool).exists()


def test_changelog_has_the_version_or_is_ahead_of_it() -> None:
    headings = re.findall(r"^## \[([^\]]+)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[0] in ("Unreleased", PROJECT["version"])


def test_ci_runs_what_a_person_runs() -> None:
    assert "make test" in (ROOT / ".ci/run").read_text()
    test = re.search(r"^test: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert test is not None
    assert test[1].split() == ["setup", "lint", "types", "unit"]


def test_nothing_is_unfinished_or_of_one_machine() -> None:
    """No notes to oneself, and no paths of the machine that something was written on."""
    unwanted = re.compile(r"\b(?:TODO|FIXME|XXX|HACK)\b|(?<![\w./:])/(?:home|root|work|Users)/\w")
    for path in tracked():
        if path == Path(__file__) or path.suffix in (".safetensors", ".png", ".svg"):
            continue
        found = unwanted.search(path.read_text(errors="ignore"))
        assert found is None, f"{path.relative_to(ROOT)}: {found[0]}"
