"""Latent attention whose pages keep latents, with adapters on the module that is absorbed: what PEFT computes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.deepseek_v2.modeling_deepseek_v2 import apply_rotary_emb
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention

from lorafleet.adapter_store.errors import AdapterRefused
from lorafleet.adapter_store.manifest import Dtype
from lorafleet.kernels import head_lora, head_lora_triton
from lorafleet.kernels.latent import LatentWorkspace
from lorafleet.workers.config import ModelConfig
from lorafleet.workers.errors import WorkerConfigError
from lorafleet.workers.memory.kv_cache import LayerKV
from lorafleet.workers.model import latent_attention, latent_rotation, rehearsal
from lorafleet.workers.model.attention_calls import Latent, expanding, read_calls
from lorafleet.workers.model.latent_rotation import Angles
from tests.support.adapters import make_adapter
from tests.support.bases import make_base
from tests.support.oracle import prompt_logprobs_with_peft
from tests.workers.harness import Shelf, ask, assert_pefts, greedy, open_worker, random_prompt
from tests.workers.test_fused_families import loud
from tests.workers.test_refusals import DEEPSEEK, refuses, save_base

YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "mscale": 1.0,
    "mscale_all_dim": 0.7,
}
BASE = {**DEEPSEEK, "qk_nope_head_dim": 8, "v_head_dim": 16, "max_position_embeddings": 128, "rope_parameters": YARN}
ATTENTION = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
ADAPTERS: dict[str, dict[str, Any]] = {
    "absorbed": {"target_modules": ["kv_b_proj"], "r": 7},
    "attention": {"target_modules": list(ATTENTION), "r": 3},
    "all_linear": {"target_modules": "all-linear", "r": 2},
    "dora": {"target_modules": list(ATTENTION), "use_dora": True, "r": 4},
    "biases": {"target_modules": ["kv_b_proj", "o_proj"], "lora_bias": True, "r": 4},
}


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Shelf:
    folder = tmp_path_factory.mktemp("latent")
    shelf = Shelf(save_base(folder / "base", "deepseek_v3", BASE))
    for name, fields in ADAPTERS.items():
        shelf.put(make_adapter(folder / name, shelf.base, strength=1.2, **fields))
    return shelf


@pytest.mark.parametrize("settings", [{}, {"max_batch_tokens": 16, "kv_bytes": 30_000}], ids=["at-once", "in-chunks"])
async def test_a_mixed_batch_as_peft_computes_it(shelf: Shelf, settings: dict[str, Any]) -> None:
    """The second time from the prefix cache, where there is room for one."""
    asked = [(version, random_prompt(41, number)) for number, version in enumerate((None, *shelf.versions))]
    sampling = greedy(6, logprobs=0, prompt_logprobs=True)
    async with open_worker(shelf, latent_cache="compressed", **settings) as worker:
        parts = worker._parts
        assert parts.runner.base.layers == (LayerKV(1, 12, has_values=False),) * 2
        assert all(values is keys for keys, values in zip(parts.cache.keys, parts.cache.values, strict=True))
        answers = await asyncio.gather(*(ask(worker, prompt, version, sampling) for version, prompt in asked))
        again = await asyncio.gather(
            *(ask(worker, prompt, version, greedy(6, logprobs=0)) for version, prompt in asked)
        )
    for (version, prompt), answer, repeated in zip(asked, answers, again, strict=True):
        assert_pefts(shelf, version, prompt, answer, 1e-4)
        assert repeated.tokens == answer.tokens
        for one, other in zip(answer.logprobs, repeated.logprobs, strict=True):
            assert one.logprob == pytest.approx(other.logprob, abs=1e-4)
    if not settings:
        assert all(answer.last.num_cached_tokens == 32 for answer in again)


@pytest.mark.gpu
async def test_on_a_gpu(shelf: Shelf) -> None:
    """In captured graphs and in prompts, beside each other; `auto` compresses there."""
    bars: dict[Dtype, float] = {"float32": 2e-3, "bfloat16": 0.3}
    for dtype, bar in bars.items():
        own = Shelf(shelf.base, dtype=dtype)
        versions = [None, *(own.put(shelf.base.parent / name) for name in ADAPTERS)]
        model = ModelConfig(id="base", source=str(shelf.base), dtype=dtype)
        async with open_worker(own, model=model, device="cuda", max_batch_tokens=32) as worker:
            assert worker._parts.runner.base.has_latents
            sampling = greedy(9, logprobs=0, prompt_logprobs=True)
            asked = [(version, random_prompt(41, number)) for number, version in enumerate(versions)]
            answers = await asyncio.gather(*(ask(worker, prompt, version, sampling) for version, prompt in asked))
        for (version, prompt), answer in zip(asked, answers, strict=True):
            tokens = (*prompt, *answer.tokens)
            expected = prompt_logprobs_with_peft(own.base, own.folders.get(version or ""), tokens)[:-1]
            given = [entry for delta in answer.deltas for entry in delta.prompt_logprobs or ()]
            found = torch.tensor([entry.logprob for entry in (*given[1:], *answer.logprobs)])
            chosen = expected.gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]
            assert float((found - chosen).abs().mean()) < bar, (version, dtype)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("deepseek_v2", {"q_lora_rank": None}),
        pytest.param("glm4_moe_lite", {}, marks=pytest.mark.slow),
        pytest.param("youtu", {}, marks=pytest.mark.slow),
        pytest.param("minicpm3", {}, marks=pytest.mark.slow),
        pytest.param("axk1", {}, marks=pytest.mark.slow),
        pytest.param("longcat_flash", {"head_dim": 4, "zero_expert_num": 2}, marks=pytest.mark.slow),
    ],
)
def test_families_with_latents(kind: str, settings: dict[str, Any]) -> None:
    """A rehearsal compares with transformers: whole prompts, parts, tokens, and adapters on every module."""
    done = rehearsal._Rehearsal(loud(kind, {**DEEPSEEK, **settings}).eval(), rehearsal.MAX_LEN, compresses=True)
    done.run()
    assert {call.latent for call in done.runner.base.calls.values()} == {Latent(rank=8, rotated=4)}
    model = done.runner.base.model
    assert all("forward" in module.__dict__ for module in expanding(model)), "the rotation is not deferred"
    assert done.runner.pool.absorbed


@pytest.mark.slow
def test_what_a_gpu_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same rehearsal with the kernels, in Triton's interpreter."""
    monkeypatch.setattr(latent_attention, "_workspace", workspace)
    for name, is_absorbed in (("add_absorbed", True), ("add_expanded", False)):
        monkeypatch.setattr(head_lora, name, partial(head_lora_triton.add, is_absorbed=is_absorbed))
    model = loud("deepseek_v3", {**DEEPSEEK, "n_routed_experts": 2, "rope_parameters": YARN}).eval()
    rehearsal._Rehearsal(model, rehearsal.MAX_LEN, compresses=True).run()


def workspace(num_heads: int, rank: int, device: torch.device) -> LatentWorkspace:
    return LatentWorkspace.allocate(num_heads=num_heads, rank=rank, device=device, num_processors=16)


def test_rotations_are_told_by_what_they_do() -> None:
    """Of neighbours and of halves, by complex numbers or cos and sin, in either order; nothing else."""
    turned = latent_rotation.rotated

    def of(is_interleaved: bool, size: float = 1.0, shuffles: bool = False) -> Callable[..., tuple[Tensor, Tensor]]:
        def own(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
            angles = Angles(cos[0, :, :4] * size, sin[0, :, :4], is_interleaved)
            order = [0, 2, 4, 6, 1, 3, 5, 7] if shuffles else list(range(8))
            return turned(query, angles)[..., order], turned(key, angles)[..., order]

        return own

    assert latent_rotation._kind(of(False), 8, 2) is False
    assert latent_rotation._kind(of(True, shuffles=True), 8, 2) is True
    assert latent_rotation._kind(of(True, size=1.01), 8, 2) is None
    assert latent_rotation._kind(of(True), 8, 1) is None
    assert latent_rotation._kind(lambda query, key, cos, sin: (query, key), 8, 2) is None
    assert latent_rotation._kind(apply_rotary_emb, 8, 1) is True


class Scaled(DeepseekV3Attention):  # type: ignore[misc]
    """Its keys are not what one linear module makes of latents."""

    def expand_kv(self, kv_nope: Tensor, k_rot: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = super().expand_kv(kv_nope, k_rot)
        return keys, values * 1.1


class Gated(DeepseekV3Attention):  # type: ignore[misc]
    """Other code of its stands between its latents and attention."""

    def forward(self, hidden_states: Tensor, *args: Any, **rest: Any) -> Any:
        own = self.expand_kv
        self.__dict__["expand_kv"] = lambda *given: tuple(each * 1.0 for each in own(*given))
        try:
            return super().forward(hidden_states, *args, **rest)
        finally:
            self.__dict__["expand_kv"] = own


@pytest.mark.parametrize("other", [Scaled, Gated])
def test_what_only_looks_like_it_keeps_keys_and_values(other: type[DeepseekV3Attention]) -> None:
    model = loud("deepseek_v3", DEEPSEEK).eval()
    model.model.layers[1].self_attn.__class__ = other
    calls = read_calls(model, 64, compresses=True)
    assert calls[0].latent is not None
    assert calls[1].latent is None
    assert calls[1].kept == LayerKV(4, 8)


async def test_settings_that_do_not_go_with_it(shelf: Shelf, tmp_path: Path) -> None:
    llama, compressed = make_base(tmp_path / "llama"), {"latent_cache": "compressed"}
    for base, engine, reason in (
        (llama, compressed, "needs latent attention, which LlamaForCausalLM does not have"),
        (shelf.base, {**compressed, "kv_dtype": "fp8"}, "takes 96 bytes a token: use kv_dtype: auto, or worker.latent"),
        (shelf.base, {**compressed, "tensor_parallel_size": 2}, "not supported with worker.tensor_parallel_size=2"),
    ):
        await refuses(WorkerConfigError, reason, base, engine=engine)


async def test_activated_lora_on_the_absorbed_module(shelf: Shelf, tmp_path: Path) -> None:
    """Tokens before and after the invocation have other keys, so it is refused; the expanded cache serves it."""
    own = Shelf(shelf.base)
    fields: dict[str, Any] = {"alora_invocation_tokens": [3, 7], "r": 4}
    on_it = own.put(make_adapter(tmp_path / "on-it", own.base, target_modules=["kv_b_proj"], **fields))
    beside = own.put(make_adapter(tmp_path / "beside", own.base, target_modules=["kv_a_proj_with_mqa"], **fields))
    prompt = (*random_prompt(20, 1), 3, 7, *random_prompt(9, 2))
    sampling = greedy(4, logprobs=0)
    async with open_worker(own, latent_cache="compressed") as worker:
        answer = await ask(worker, prompt, beside, sampling)
        with pytest.raises(AdapterRefused, match=r"kv_b_proj.*Set worker\.latent_cache to expanded"):
            await ask(worker, prompt, on_it, sampling)
    async with open_worker(own) as worker:
        assert (await ask(worker, prompt, beside, sampling)).tokens == answer.tokens
        assert len((await ask(worker, prompt, on_it, sampling)).tokens) == 4
