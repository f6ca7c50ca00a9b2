"""The README's commands do what it says, as printed, against the service that `make serve` starts."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PORT = "8000"


def bash_commands() -> list[str]:
    """Every command of the README's `bash` blocks, in order."""
    blocks = re.findall(r"^```bash\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    return [command.strip() for block in blocks for command in re.split(r"(?<!\\)\n", block) if command.strip()]


SERVE = """
import sys

sys.path.insert(0, "examples/demo")
import demo
from service import ROOT, running_service

with running_service(ROOT / "deploy/serve/local.yaml", port=None, keep_state=False) as service:
    with service.admin() as admin:
        demo.load_all(admin)
    print("READY", service.url.rpartition(":")[2], service.ray_address, flush=True)
    sys.stdin.read()
"""
"""Like `make serve`, on a free port, until its standard input ends."""


@pytest.fixture(scope="module")
def served_at() -> Iterator[tuple[str, str]]:
    """The port of the demo's service with its adapters, and the address of its Ray, which is a process's own."""
    command = [sys.executable, "-c", SERVE]
    # Without the secrets of a service that other tests may keep in this process.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("LORAFLEET_")}
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        said = ""
        for line in process.stdout:
            said += line
            if line.startswith("READY"):
                break
        assert process.poll() is None, said
        _, port, ray_address = line.split()
        yield port, ray_address
        process.stdin.close()
        process.stdout.read()


@pytest.mark.ray
@pytest.mark.slow
def test_commands_work_as_printed(served_at: tuple[str, str]) -> None:
    port, ray_address = served_at
    outputs = {}
    for command in bash_commands():
        script = command.replace(f":{PORT}/", f":{port}/").replace("curl ", "curl --silent --show-error --fail ")
        script = script.replace(".venv/bin/python", sys.executable)
        environment = os.environ | {"RAY_ADDRESS": ray_address, "PYTHONUNBUFFERED": "1"}
        done = subprocess.run(
            ["bash", "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        outputs[command] = done.stdout
    text = "\n".join(outputs.values())
    assert len(outputs) == 9
    assert text.count("Arr") == 2, "the pirate answers over HTTP and through the handle"
    assert "data: [DONE]" in text
    assert '"fits":true' in text
    assert '"pinned":true' in text
    assert '"deleted":true' in text


def test_python_block_is_the_example() -> None:
    (block,) = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    assert block in (ROOT / "examples/handle.py").read_text()
