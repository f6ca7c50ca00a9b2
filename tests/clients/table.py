"""The clients that are driven, at their versions, and where `make clients` installs them."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

HOME = Path(__file__).parents[2] / "build" / "clients"
SCRIPTS = Path(__file__).with_name("scripts")
NODE = shutil.which("node")


@dataclass(frozen=True, slots=True)
class Client:
    """Packages of one environment, and the script that drives them."""

    packages: tuple[str, ...]
    script: Path


CLIENTS = {
    "langchain": Client(("langchain-openai==1.7.4", "langchain==1.5.2"), SCRIPTS / "drive_langchain.py"),
    "litellm": Client(("litellm==1.110.2",), SCRIPTS / "drive_litellm.py"),
    "instructor": Client(("instructor==1.17.0",), SCRIPTS / "drive_instructor.py"),
    "pydantic-ai": Client(("pydantic-ai-slim[openai,anthropic]==2.68.0",), SCRIPTS / "drive_pydantic_ai.py"),
    "llama-index": Client(
        ("llama-index-llms-openai-like==0.8.1", "llama-index-core==0.14.25"), SCRIPTS / "drive_llama_index.py"
    ),
    "inspect-ai": Client(("inspect-ai==0.3.285", "openai==3.57.0"), SCRIPTS / "drive_inspect_ai.py"),
    "lm-eval": Client(("lm-eval[api]==0.4.13", "transformers>=5"), SCRIPTS / "drive_lm_eval.py"),
    "guidellm": Client(("guidellm==0.8.1",), SCRIPTS / "drive_guidellm.py"),
    "aiperf": Client(("aiperf==0.13.0",), SCRIPTS / "drive_aiperf.py"),
    "openai-node": Client(("openai@6.49.0", "zod@4.6.7"), SCRIPTS / "drive_openai_node.mjs"),
    "vercel-ai": Client(
        ("ai@6.0.326", "@ai-sdk/openai-compatible@2.0.92", "@ai-sdk/openai@3.0.141", "zod@4.6.7"),
        SCRIPTS / "drive_vercel_ai.mjs",
    ),
}
