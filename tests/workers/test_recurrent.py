"""Bases whose layers keep recurrent states answer as transformers and PEFT do, whatever else is in the batch."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM
from transformers.models.qwen3_next import modeling_qwen3_next

from lorafleet.adapter_store.manifest import Dtype
from lorafleet.workers.config import EngineConfig, ModelConfig, PoolConfig, SpeculationConfig
from lorafleet.workers.errors import UnsupportedModel, WorkerConfigError
from lorafleet.workers.memory.kv_cache import KVCache
from lorafleet.workers.memory.state_store import StateStore
from lorafleet.workers.model import recurrent_layers
from lorafleet.workers.model.loader import load_base
from lorafleet.workers.model.recurrent_layers import MOST_ROWS
from lorafleet.workers.model.rehearsal import rehearse
from lorafleet.workers.model.runner import ModelRunner
from lorafleet.workers.ranks import Ranks
from lorafleet.workers.sizing import memory_sizes
from tests.support.adapters import randomise_adapter
from tests.support.bases import make_tokenizer
from tests.support.oracle import load_with_peft, prompt_logprobs_with_peft
from tests.workers.harness import (
    ENGINE,
    Answer,
    Shelf,
    ask,
    assert_pefts,
    greedy,
    open_worker,
    random_prompt,
    request_of,
)
from tests.workers.test_refusals import SHAPE
from tests.workers.test_replayed_steps import BY_ROW, replay

MAMBA = {
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_d_state": 8,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 8,
    "mamba_expand": 2,
}
DELTA = {
    "head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}
SIZES: dict[str, dict[str, Any]] = {
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    "granitemoehybrid": {
        **MAMBA,
        "layer_types": ["linear_attention", "full_attention"],
        "shared_intermediate_size": 48,
        "num_local_experts": 0,
    },
    "qwen3_next": {
        **DELTA,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
    },
    "falcon_h1": {**MAMBA, "mamba_n_groups": 2, "mamba_d_ssm": 64},
}
CASES: dict[str, dict[str, Any]] = {
    "attention": {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]},
    "recurrent": {"target_modules": r".*\.(conv|mamba|linear_attn)\.(in_proj\w*|out_proj)"},
    "all-linear": {"target_modules": "all-linear"},
    "ends": {"target_modules": ["embed_tokens", "lm_head"]},
}
OTHERWISE: dict[str, dict[str, dict[str, Any]]] = {
    "falcon_h1": {"recurrent": {"target_modules": r".*\.mamba\.in_proj"}, "all-linear": CASES["attention"]},
    "qwen3_next": {
        "all-linear": {
            "target_modules": [
                *CASES["attention"]["target_modules"],
                "in_proj_qkvz",
                "in_proj_ba",
                "shared_expert_gate",
            ]
        }
    },
}
"""Where PEFT makes no such adapter, or not with every version of transformers."""


def save(folder: Path, kind: str, settings: dict[str, Any]) -> Path:
    """A tiny base with loud random weights."""
    config = AutoConfig.for_model(kind, **SHAPE | {"max_position_embeddings": 128, "pad_token_id": 0} | settings)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 1.2 * parameter.shape[-1] ** -0.5)
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=SIZES)
def shelf(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shelf]:
    """A tiny base, and adapters that PEFT made on each of its kinds of modules."""
    folder = tmp_path_factory.mktemp(request.param)
    base = save(folder / "base", request.param, SIZES[request.param])
    made = Shelf(base)
    for name, fields in CASES.items():
        fields = OTHERWISE.get(request.param, {}).get(name, fields)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
            peft = get_peft_model(plain, LoraConfig(r=3, lora_alpha=6, task_type="CAUSAL_LM", **fields))
            randomise_adapter(peft, 0.5)
            peft.save_pretrained(folder / name, save_embedding_layers=False)
        made.put(folder / name)
    yield made
    load_with_peft.cache_clear()


ONE = pytest.mark.parametrize("shelf", ["granitemoehybrid"], indirect=True)


async def assert_as_peft(shelf: Shelf, num_tokens: int = 6, **settings: object) -> int:
    """Ask for prompts with the base and with all adapters at once, and return how often one was preempted."""
    asked = [(random_prompt(length, length), version) for length in (1, 9, 45) for version in (None, *shelf.versions)]
    sampling = greedy(num_tokens, logprobs=0, prompt_logprobs=True)
    engine = EngineConfig.model_validate(ENGINE.model_dump() | {"max_batch_tokens": 32} | settings)
    async with open_worker(shelf, engine=engine) as worker:
        answers = await asyncio.gather(*(ask(worker, prompt, version, sampling) for prompt, version in asked))
        num_preemptions = (await worker.served()).num_preemptions
    for (prompt, version), answer in zip(asked, answers, strict=True):
        assert_pefts(shelf, version, prompt, answer, 1e-4)
    return num_preemptions


async def test_mixed_batches(shelf: Shelf) -> None:
    """Prompts in chunks beside decodes, of the base and of adapters on each kind of module."""
    await assert_as_peft(shelf)


@ONE
async def test_preempted(shelf: Shelf) -> None:
    """With less memory than the sequences need together, and fewer slots than there are sequences."""
    assert await assert_as_peft(shelf, num_tokens=16, kv_bytes=20 << 10, max_running=6, kv_page_tokens=4) > 0


@ONE
async def test_in_graphs(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    """Decodes are padded to the forms of graphs, and launched before the step before them is collected.

    No step with prompts is: lines of a graph cannot share a state.
    """
    replayed = replay(monkeypatch, BY_ROW)
    monkeypatch.setattr(ModelRunner, "is_asynchronous", True)
    await assert_as_peft(shelf)
    assert replayed
    assert all(header.num_rows in (4, 16, 64) and header.num_sampled_rows <= header.num_rows for header in replayed)


@ONE
async def test_slots_of_the_aborted_are_given_on(shelf: Shelf) -> None:
    """One slot, which those leave that nobody waits for any more."""
    prompt, sampling = random_prompt(40, 3), greedy(5, logprobs=0, prompt_logprobs=True)
    async with open_worker(shelf, max_running=1, max_batch_tokens=16) as worker:
        for seed in range(3):
            stream = worker.generate(request_of(random_prompt(30, seed), None, greedy(60)))
            await anext(stream)
            slots = (await worker.state()).state_slots
            assert slots is not None
            assert (slots.used, slots.total) == (1, 1)
            assert slots.slot_bytes == 4 * (8 * 8 * 8 + 3 * (64 + 2 * 8))  # heads and taps in float32
            await stream.aclose()
        answer: Answer = await ask(worker, prompt, None, sampling)
    assert_pefts(shelf, None, prompt, answer, 1e-4)


@ONE
async def test_without_prefix_cache_and_guesses(shelf: Shelf, caplog: pytest.LogCaptureFixture) -> None:
    prompt = random_prompt(5, 0) * 9
    with caplog.at_level(logging.WARNING, "lorafleet"):
        async with open_worker(shelf, speculation=SpeculationConfig(tokens=4).model_dump()) as worker:
            first, second = [await ask(worker, prompt, None, greedy(20)) for _ in range(2)]
            counts = await worker.served()
    assert first.tokens == second.tokens
    assert (counts.num_cached_tokens, counts.num_guessed_tokens) == (0, 0)
    assert "recurrent layers" in caplog.text
    assert "without a prefix cache and without speculation" in caplog.text


@ONE
def test_more_ranks_are_refused(shelf: Shelf) -> None:
    model = ModelConfig(id="base", source=str(shelf.base), dtype="float32")
    with pytest.raises(UnsupportedModel, match=r"recurrent state.* for 2 ranks: set worker.tensor_parallel_size to 1"):
        load_base(model, torch.device("cpu"), Ranks(0, 2))


@ONE
def test_states_are_taken_off_the_memory_for_pages(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    base = load_base(ModelConfig(id="base", source=str(shelf.base), dtype="float32"), torch.device("cpu"))
    on_gpu = replace(base, device=torch.device("cuda"))
    engine, pool = EngineConfig(max_running=64, gpu_memory_utilization=1), PoolConfig(pool_bytes=1 << 20)
    state_bytes = StateStore.slot_bytes(base.states) * 65
    free = (1 << 20) + state_bytes + (1 << 19)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, free))
    page_bytes = KVCache.page_bytes(base.layers, engine.kv_page_tokens, torch.float32)
    assert memory_sizes(on_gpu, engine, pool).num_kv_pages == (1 << 19) // page_bytes
    free = state_bytes
    with pytest.raises(
        WorkerConfigError,
        match=r"beside the weights and the recurrent states .*max_running=64.*lower one of them or worker.max_running",
    ):
        memory_sizes(on_gpu, engine, pool)


async def test_a_base_without_attention(tmp_path: Path) -> None:
    """Mamba 2 keeps nothing on its pages."""
    sizes = {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 2, "chunk_size": 8}
    await assert_as_peft(Shelf(save(tmp_path / "base", "mamba2", sizes)))


def test_pieces_of_long_prompts() -> None:
    """A long piece is computed by parts, of which the last may be one row."""
    generator = torch.Generator().manual_seed(0)
    rows = MOST_ROWS + 1
    x, dt = torch.randn(1, rows, 4, 8, generator=generator), torch.rand(1, rows, 4, generator=generator)
    b, c = (torch.randn(1, rows, 2, 8, generator=generator) for _ in range(2))
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("mamba2", **SHAPE, num_heads=8, head_dim=8))
    scan = recurrent_layers._forward(model.backbone.layers[0].mixer).__globals__["mamba2_chunk_scan"]
    context = recurrent_layers.RecurrentContext()
    wanted, state = scan(x, dt, -torch.ones(4), b, c, 64, return_final_states=True)
    operation = recurrent_layers.OPERATIONS["mamba2_chunk_scan"]("scan", {"mamba2_chunk_scan": scan}, context)
    operation(x, dt, -torch.ones(4), b, c, 64)
    context.store = StateStore(context.shapes, num_slots=2, device=torch.device("cpu"))
    context.store.tensors["scan"].fill_(float("nan"))
    context.pieces = recurrent_layers._Pieces(
        0, torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.bool), ((0, rows, 2, True),)
    )
    torch.testing.assert_close(operation(x, dt, -torch.ones(4), b, c, 64), wanted, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(context.store.tensors["scan"][2:], state, atol=1e-3, rtol=1e-3)
    assert context.store.tensors["scan"][:2].isnan().all()


def test_a_layer_that_forgets_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As if nobody knew that the function looks at earlier rows."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(recurrent_layers, "OPERATIONS", {})
    with pytest.raises(UnsupportedModel, match=r"layers\.0\.conv \(Lfm2ShortConv\) .* when a prompt comes in parts"):
        rehearse(AutoConfig.for_model("lfm2", **SHAPE | SIZES["lfm2"]), 64)


def test_kernels_of_other_packages_are_for_gpus(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As if flash-linear-attention and causal-conv1d were installed: the base is rehearsed and served on a CPU."""
    base = save(tmp_path, "qwen3_next", SIZES["qwen3_next"])
    names = ("torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule", "causal_conv1d_fn")
    for name in names:
        own = getattr(modeling_qwen3_next, name)

        @functools.wraps(own)
        def kernel(*args: object, **kwargs: object) -> None:
            raise RuntimeError("there is no driver for this tensor")

        monkeypatch.setattr(modeling_qwen3_next, name, kernel)
    monkeypatch.setattr(modeling_qwen3_next, "nullcontext", contextlib.contextmanager(another_modules), raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    caplog.set_level("INFO")
    assert not rehearse(AutoConfig.from_pretrained(base), 64)
    assert "no small copy" not in caplog.text
    for name in names:
        with pytest.raises(RuntimeError, match="no driver"):
            getattr(modeling_qwen3_next, name)()
    loaded = load_base(ModelConfig(id="base", source=str(base)), torch.device("cpu"))
    assert loaded.probe_logits.isfinite().all()
    with modeling_qwen3_next.nullcontext():
        pass


def another_modules() -> Iterator[None]:
    """A function that a base's module may import, with a decorator that it needs."""
    yield


@pytest.mark.gpu
async def test_on_a_gpu(shelf: Shelf) -> None:
    """In captured graphs and in prompts, in bfloat16 and in float32."""
    prompt = random_prompt(23, 1)
    bars: dict[Dtype, float] = {"float32": 2e-3, "bfloat16": 0.3}
    for dtype, bar in bars.items():
        own = Shelf(shelf.base, dtype=dtype)
        versions = [own.put(folder) for folder in shelf.folders.values()]
        model = ModelConfig(id="base", source=str(shelf.base), dtype=dtype)
        sampling = greedy(9, logprobs=0, prompt_logprobs=True)
        async with open_worker(own, model=model, device="cuda") as worker:
            answers = await asyncio.gather(*(ask(worker, prompt, version, sampling) for version in (None, *versions)))
        for version, answer in zip((None, *versions), answers, strict=True):
            tokens = (*prompt, *answer.tokens)
            expected = on_a_cpu(own.base, own.folders.get(version or ""), tokens)
            given = answer.deltas[0].prompt_logprobs
            assert given is not None
            got = torch.tensor([entry.logprob for entry in (*given[1:], *answer.logprobs)])
            wanted = expected.gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]
            assert float((got - wanted).abs().mean()) < bar, (version, dtype)


def on_a_cpu(base: Path, adapter: Path | None, tokens: Sequence[int]) -> torch.Tensor:
    """The oracle by transformers' own functions: kernels of other packages, where they are installed, are for GPUs."""
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(AutoConfig.from_pretrained(base))]
    restore = recurrent_layers.take_plain_functions(model_class)
    try:
        return prompt_logprobs_with_peft(base, adapter, tokens)[:-1]
    finally:
        restore()
