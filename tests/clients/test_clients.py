"""Real clients against a service with the demo's base. What `make clients` has not installed is skipped."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.clients.service import DEMO, client_service
from tests.clients.table import CLIENTS, HOME, NODE
from tests.cluster.serving import Service

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    with client_service() as running:
        yield running


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base's tokenizer under a class that transformers 4 knows too, for clients that tokenize themselves."""
    folder = tmp_path_factory.mktemp("tokenizer")
    for name in ("config.json", "tokenizer.json", "chat_template.jinja"):
        shutil.copy(DEMO / "base" / name, folder)
    settings = json.loads((DEMO / "base" / "tokenizer_config.json").read_text())
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.mark.parametrize("name", CLIENTS)
def test_client(name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    script, home = CLIENTS[name].script, HOME / name
    if not home.exists():
        pytest.skip(f"make clients CLIENTS={name} installs it")
    service, tokenizer = request.getfixturevalue("service"), request.getfixturevalue("tokenizer")
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(tmp_path),
        "BASE": service.url,
        "TOKENIZER": str(tokenizer),
        "ADAPTERS": str(DEMO / "adapters"),
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
    }
    program: list[str | Path] = [home / "bin" / "python", script]
    if script.suffix == ".mjs":  # node looks for packages beside the script
        assert NODE is not None
        program = [NODE, shutil.copy(script, home)]
    done = subprocess.run(program, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert done.stdout.splitlines()[-1] == "ok"
