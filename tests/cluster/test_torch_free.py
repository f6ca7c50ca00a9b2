"""Processes that compute nothing start without torch, and read a base as transformers with torch reads it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from transformers import AutoConfig, AutoTokenizer

BASE = Path(__file__).parents[2] / "examples" / "demo" / "base"
TEXT = "Say something about the sea."
CHAT = [{"role": "user", "content": TEXT}]

SCRIPT = f"""
import asyncio, json, sys
import lorafleet.cluster.admin.controller
import lorafleet.cluster.ingress
from lorafleet.cluster.serving.prompts import Prompts
from lorafleet.workers.checkpoint import without_torch
from lorafleet.workers.config import ModelConfig
from lorafleet.workers.request import GenerateRequest, StructuredOutputs

async def main():
    with without_torch():
        prompts = Prompts.load(ModelConfig(id="m", source={str(BASE)!r}))
    await prompts.check_grammar(StructuredOutputs(regex="[a-z]+"))
    token_ids = await prompts.tokenize(GenerateRequest(model="m", prompt={TEXT!r}))
    return {{
        "token_ids": token_ids,
        "text": prompts.vocabulary.text_of(token_ids),
        "chat": await prompts.render({CHAT!r}),
        "vocab_size": prompts.vocab_size,
        "max_model_len": prompts.max_model_len,
        "torch": [name for name in sys.modules if name.partition(".")[0] == "torch"],
    }}

print(json.dumps(asyncio.run(main())))
"""


def test_an_ingress_and_a_controller_import_no_torch() -> None:
    run = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    tokenizer, config = AutoTokenizer.from_pretrained(BASE), AutoConfig.from_pretrained(BASE)
    token_ids = tokenizer(TEXT)["input_ids"]
    assert found == {
        "token_ids": token_ids,
        "text": tokenizer.decode(token_ids, skip_special_tokens=True),
        "chat": tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True),
        "vocab_size": config.vocab_size,
        "max_model_len": config.max_position_embeddings,
        "torch": [],
    }
