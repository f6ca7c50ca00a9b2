"""Bases and settings that a worker does not take, and how it says so."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from lorafleet.workers.config import EngineConfig, ModelConfig, PoolConfig
from lorafleet.workers.errors import UnsupportedModel, WorkerConfigError
from lorafleet.workers.model.geometry import read_geometry
from lorafleet.workers.worker import Worker
from tests.support.bases import BaseKind, make_base
from tests.workers.harness import Shelf, ask, greedy, open_worker, random_prompt

SHAPE = {
    "vocab_size": 304,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
DEEPSEEK = {
    **SHAPE,
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
    "n_group": 1,
    "topk_group": 1,
}
LLAMA4 = {
    **SHAPE,
    "head_dim": 8,
    "intermediate_size_mlp": 48,
    "num_local_experts": 2,
    "attention_chunk_size": 16,
    "no_rope_layers": [1, 0],
    "attn_temperature_tuning": False,
}
SMALL = {"vocab_size": 304, "num_hidden_layers": 2, "num_layers": 2, "n_layer": 2}

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "t5": ({"vocab_size": 304, "d_model": 32, "d_ff": 48, "num_layers": 2, "num_heads": 4}, "encoder-decoder"),
    "mamba": ({**SMALL, "hidden_size": 32, "state_size": 4}, "recurrent state"),
    "deepseek_v32": (DEEPSEEK, "hands attention indices"),
    "llama4_text": (LLAMA4, "chunks of 16 tokens"),
    "llama4_text/temperature": (
        {**LLAMA4, "attention_chunk_size": 64, "attn_temperature_tuning": True, "floor_scale": 32},
        "by the position from 32 tokens on",
    ),
    "openai-gpt": (
        {"vocab_size": 304, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
        "does not attend through transformers",
    ),
    # It attends to what comes after, too.
    "bert": ({key: value for key, value in SHAPE.items() if "key_value" not in key}, "tokens that come after"),
}


def save_base(folder: Path, kind: str, settings: dict[str, Any]) -> Path:
    """A base of any of transformers' kinds with loud random weights."""
    config = AutoConfig.for_model(kind, **settings, bos_token_id=1, eos_token_id=2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        model = auto.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(0, 1.5 * parameter.shape[-1] ** -0.5)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", REFUSED)
async def test_what_cannot_be_served_right_is_not_served(kind: str, tmp_path: Path) -> None:
    settings, reason = REFUSED[kind]
    base = save_base(tmp_path, kind.partition("/")[0], settings)
    await refuses(UnsupportedModel, reason, base)


async def refuses(
    error: type[WorkerConfigError],
    reason: str,
    base: Path | str,
    *,
    model: dict[str, Any] | None = None,
    engine: dict[str, Any] | None = None,
    pool: dict[str, Any] | None = None,
) -> None:
    """A worker with these settings does not start; it says `reason`."""
    with pytest.raises(error, match=reason):
        Worker(
            worker_id="w",
            model=ModelConfig(**{"id": "base", "source": str(base), **(model or {})}),
            engine=EngineConfig(**{"device": "cpu", **(engine or {})}),
            pool=PoolConfig(**(pool or {})),
            fetch=Shelf.fetch,  # type: ignore[arg-type]
        )


SERVED: dict[str, dict[str, Any]] = {
    # Scores that are capped, sinks, and values that are narrower or wider than keys.
    "gemma2": {**SHAPE, "head_dim": 8, "sliding_window": 8, "attn_logit_softcapping": 2.0},
    "gpt_oss": {**SHAPE, "head_dim": 8, "sliding_window": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
    "deepseek_v3": {**DEEPSEEK, "qk_nope_head_dim": 8},
    "deepseek_v2": {**DEEPSEEK, "v_head_dim": 16},
    # Heads of other sizes in some layers, and layers that use the keys and values of earlier ones.
    "gemma4_text": {
        **SHAPE,
        "head_dim": 8,
        "global_head_dim": 16,
        "num_global_key_value_heads": 1,
        "attention_k_eq_v": True,
        "sliding_window": 8,
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 304,
    },
    "gemma3_text": {
        **SHAPE,
        "head_dim": 8,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "mixtral": {**SHAPE, "num_local_experts": 4},
    "phi3": {**SHAPE, "pad_token_id": 0},
    "opt": {
        "vocab_size": 304,
        "hidden_size": 32,
        "ffn_dim": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "word_embed_proj_dim": 32,
    },
    "cohere2": {**SHAPE, "sliding_window": 8},
    # Their masks alone say the window.
    "qwen2_moe": {
        **SHAPE,
        "use_sliding_window": True,
        "sliding_window": 8,
        "max_window_layers": 1,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
    },
    "phimoe": {**SHAPE, "sliding_window": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
}


@pytest.mark.parametrize("kind", SERVED)
@pytest.mark.slow
async def test_what_differs_only_in_its_layers_is_served(kind: str, tmp_path: Path) -> None:
    """Scaled embeddings, windows in some layers, experts, one matrix for gate and up, learned positions."""
    shelf = Shelf(save_base(tmp_path, kind, SERVED[kind]))
    prompt = random_prompt(30, 0)
    async with open_worker(shelf, max_batch_tokens=16) as worker:
        answer = await ask(worker, prompt, None, greedy(12, logprobs=0))
    model = AutoModelForCausalLM.from_pretrained(shelf.base, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([prompt + answer.tokens]), use_cache=False).logits[0].log_softmax(-1)
    for place, entry in enumerate(answer.logprobs, start=len(prompt) - 1):
        assert int(expected[place].argmax()) == entry.token_id
        assert entry.logprob == pytest.approx(float(expected[place, entry.token_id]), abs=1e-4)


async def test_no_base_at_all(tmp_path: Path) -> None:
    await refuses(UnsupportedModel, "absent' is not there: give a folder or a hub id", tmp_path / "absent")
    (tmp_path / "config.json").write_text("{}")
    await refuses(UnsupportedModel, "cannot be loaded by transformers", tmp_path)


@pytest.mark.slow
async def test_a_checkpoint_that_lacks_a_weight_is_not_made_up(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    path = base / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    await refuses(UnsupportedModel, r"lacks the weights model\.layers\.1\.mlp\.up_proj\.weight", base)
    path.write_bytes(path.read_bytes()[:-100])
    await refuses(UnsupportedModel, "cannot be loaded", base)
    path.rename(base / "pytorch_model.bin")
    await refuses(UnsupportedModel, "cannot be loaded", base)


async def test_a_checkpoint_of_another_shape(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "intermediate_size": 96}))
    await refuses(UnsupportedModel, "cannot be loaded", base)


async def test_memory_that_does_not_suffice_names_its_setting(base_of: Callable[[BaseKind], Path]) -> None:
    base = base_of("llama")
    await refuses(
        WorkerConfigError, r"worker\.kv_bytes: 1000 bytes hold 0 KV pages.* to 270336 ", base, engine={"kv_bytes": 1000}
    )
    await refuses(
        WorkerConfigError, r"worker\.kv_bytes \(1048576\.0 GiB\).* lower one", base, engine={"kv_bytes": 2**50}
    )
    # What it says suffices does.
    shelf = Shelf(base)
    async with open_worker(shelf, kv_bytes=270336) as worker:
        assert len((await ask(worker, random_prompt(500, 0), None, greedy(12))).tokens) == 12
    await refuses(
        WorkerConfigError, r"pool_bytes must be at least one page of \d+ bytes; got 100", base, pool={"pool_bytes": 100}
    )
    await refuses(
        UnsupportedModel,
        "max_model_len=4096 is more than the base's 512 positions",
        base,
        model={"max_model_len": 4096},
    )


async def test_devices_that_are_not_here(base_of: Callable[[BaseKind], Path]) -> None:
    base = base_of("llama")
    await refuses(WorkerConfigError, r"worker\.device: there is no 'cuda:99' here", base, engine={"device": "cuda:99"})


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        (lambda: EngineConfig(max_batch_tokens=0), "max_batch_tokens"),
        (lambda: EngineConfig(kv_bytes="a lot"), "kv_bytes"),
        (lambda: EngineConfig(device="tpu9"), "device"),
        (lambda: EngineConfig.model_validate({"max_runing": 3}), "max_runing"),
        (lambda: PoolConfig(max_rank=0), "max_rank"),
        (lambda: PoolConfig(pool_bytes="12 parsecs"), "pool_bytes"),
        (lambda: ModelConfig(id="", source="x"), "id"),
        (lambda: ModelConfig(id="x", source="x", dtype="int3"), "dtype"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_settings_name_the_field(settings: Callable[[], object], field: str) -> None:
    with pytest.raises(ValidationError, match=field):
        settings()


@pytest.mark.parametrize(
    ("text", "expected"), [("1GiB", 2**30), ("512 MB", 512 * 10**6), ("1.5KiB", 1536), (77, 77), ("auto", "auto")]
)
def test_sizes(text: str | int, expected: int | str) -> None:
    assert PoolConfig.model_validate({"pool_bytes": text}).pool_bytes == expected


def test_geometry_is_read_without_weights(base_of: Callable[[BaseKind], Path], tmp_path: Path) -> None:
    base = base_of("qwen2")
    (tmp_path / "config.json").write_bytes((base / "config.json").read_bytes())
    geometry = read_geometry(ModelConfig(id="base", source=str(tmp_path)), "cpu")
    assert geometry == read_geometry(ModelConfig(id="base", source=str(base)), "cpu")
    assert geometry.dtype == "float32"
    shapes = {name: (shape.kind, shape.in_dim, shape.out_dim) for name, shape in geometry.modules.items()}
    assert shapes["model.embed_tokens"] == ("embedding", 304, 64)
    assert shapes["model.layers.1.self_attn.k_proj"] == ("linear", 64, 32)
    assert shapes["model.layers.0.mlp.down_proj"] == ("linear", 112, 64)
    assert shapes["lm_head"] == ("linear", 64, 304)
    assert len(shapes) == 2 * 7 + 2
