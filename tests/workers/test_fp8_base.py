"""A base rounded to fp8 against PEFT on weights that torch rounded, and the adapters on it."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from lorafleet.adapter_store.manifest import BaseGeometry, ModuleShape
from lorafleet.kernels.segments import build_segments
from lorafleet.workers.config import ModelConfig
from lorafleet.workers.errors import UnsupportedModel, WorkerConfigError
from lorafleet.workers.model.lora_context import LoraContext
from lorafleet.workers.model.lora_layers import FusedProjection
from lorafleet.workers.model.quantisation import pack_weights, round_weights
from lorafleet.workers.ranks import Ranks
from tests.kernels.paged import paged_linear
from tests.support.adapters import make_adapter
from tests.support.bases import BaseKind, make_base
from tests.support.oracle import generate_with_peft, load_with_peft, prompt_logprobs_with_peft
from tests.workers.harness import Shelf, ask, greedy, open_worker, random_prompt

NUM_TOKENS = 16


def rounded(x: Tensor) -> Tensor:
    """Each row at the smallest power-of-two scale that keeps it within 448, rounded as torch casts."""
    scales = torch.exp2(torch.ceil(torch.log2(x.abs().amax(-1, keepdim=True).double().clamp(min=1e-30) / 448)))
    return ((x.double() / scales).to(torch.float8_e4m3fn).double() * scales).to(x.dtype)


def write_rounded(base: Path, folder: Path) -> Path:
    """A copy of the base whose linear weights in the body are rounded, q, k and v at one scale, and gate and up."""
    shutil.copytree(base, folder)
    tensors = load_file(folder / "model.safetensors")
    groups: dict[str, list[str]] = {}
    for name in tensors:
        if name.endswith("_proj.weight"):
            parent, _, last = name.removesuffix(".weight").rpartition(".")
            shared = "qkv" if last[0] in "qkv" else "gate_up" if last in ("gate_proj", "up_proj") else last
            groups.setdefault(f"{parent}.{shared}", []).append(name)
    assert len(groups) == 8
    for names in groups.values():
        flat = torch.cat([tensors[name].flatten() for name in names])
        parts = torch.split(rounded(flat), [tensors[name].numel() for name in names])
        for name, part in zip(names, parts, strict=True):
            tensors[name] = part.view_as(tensors[name]).clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("kind", "size"), [("llama", 1), ("llama_tied", 1), ("qwen2", 1), ("qwen3", 1), ("llama_tied", 2), ("qwen2", 2)]
)
@pytest.mark.slow
async def test_on_a_cpu_a_mixed_batch_says_what_peft_says_on_the_rounded_weights(
    kind: BaseKind, size: int, tmp_path: Path
) -> None:
    """Ranks round at the scales of the whole weights."""
    base = make_base(tmp_path / "base", kind)
    oracle = write_rounded(base, tmp_path / "rounded")
    shelf = Shelf(base)
    folders = [None, make_adapter(tmp_path / "a", base, "rank16"), make_adapter(tmp_path / "b", base, "rank4_qv")]
    versions = [None if folder is None else shelf.put(folder) for folder in folders]
    model = ModelConfig(id="base", source=str(base), quantization="fp8")
    sampling = greedy(NUM_TOKENS, logprobs=0)
    async with open_worker(shelf, model=model, tensor_parallel_size=size) as worker:
        answers = await asyncio.gather(*(ask(worker, range(5, 35), version, sampling) for version in versions))
    plain = generate_with_peft(base, None, range(5, 35), NUM_TOKENS)
    for folder, answer in zip(folders, answers, strict=True):
        expected = generate_with_peft(oracle, folder, range(5, 35), NUM_TOKENS)
        assert answer.tokens == expected.tokens
        logprobs = torch.tensor([entry.logprob for entry in answer.logprobs])
        assert (logprobs - expected.chosen_logprobs).abs().max() < 1e-4
    first = answers[0].logprobs[0].logprob
    assert first is not None
    assert (first - plain.logprobs[0][answers[0].tokens[0]]).abs() > 1e-4


@contextmanager
def rounding_inputs(model: nn.Module) -> Iterator[None]:
    """Within it, the base's linear modules below the head see their inputs rounded to bfloat16, then to fp8."""
    hooks = [
        module.register_forward_pre_hook(lambda _, inputs: (rounded(inputs[0].bfloat16().float()),))
        for name, module in model.named_modules()
        if type(module) is nn.Linear and ("_proj" in name) and "lora_" not in name
    ]
    assert hooks
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "own_layers"])
async def test_on_a_gpu_rows_are_rounded_and_adapters_are_not(kind: BaseKind, fused: bool, tmp_path: Path) -> None:
    """Prompts in chunks and short ones, of the base and of adapters."""
    overrides: dict[str, Any] = {} if fused else {"hidden_act": "gelu"}
    base = make_base(tmp_path / "base", kind, dtype=torch.bfloat16, max_position_embeddings=2048, **overrides)
    oracle = write_rounded(base, tmp_path / "rounded")
    await assert_rows_are_rounded(
        ModelConfig(id="base", source=str(base), quantization="fp8", dtype="bfloat16"), oracle, tmp_path
    )


async def assert_rows_are_rounded(model: ModelConfig, oracle: Path, adapters: Path) -> None:
    """Logprobs are as far from the exact ones, of the oracle's base, as when transformers rounds the same inputs."""
    shelf = Shelf(Path(model.source), dtype="bfloat16")
    folders = [None, make_adapter(adapters / "a", oracle, "rank16"), make_adapter(adapters / "b", oracle, "rank4_qv")]
    versions = [None if folder is None else shelf.put(folder) for folder in folders]
    sampling = greedy(NUM_TOKENS, logprobs=0, prompt_logprobs=True)
    prompts = [random_prompt(length, length) for length in (40, 1200)]
    asked = [(prompt, folder, version) for prompt in prompts for folder, version in zip(folders, versions, strict=True)]
    async with open_worker(
        shelf, model=model, device="cuda", max_batch_tokens=2048, kv_bytes=64 << 20, prefix_cache=False
    ) as worker:
        answers = await asyncio.gather(*(ask(worker, prompt, version, sampling) for prompt, _, version in asked))
    for (prompt, folder, _), answer in zip(asked, answers, strict=True):
        token_ids = (*prompt, *answer.tokens)
        chosen = torch.tensor(token_ids[1:])[:, None]
        exact = prompt_logprobs_with_peft(oracle, folder, token_ids)[:-1].gather(1, chosen)[:, 0]
        with rounding_inputs(load_with_peft(oracle, folder)):
            expected = prompt_logprobs_with_peft(oracle, folder, token_ids)[:-1].gather(1, chosen)[:, 0]
        first = next(delta.prompt_logprobs for delta in answer.deltas if delta.prompt_logprobs is not None)
        got = [entry.logprob for entry in first if entry.logprob is not None] + [
            entry.logprob for entry in answer.logprobs
        ]
        error, effect = (torch.tensor(got) - exact).abs().mean(), (exact - expected).abs().mean()
        name = f"{oracle.parent.name} {len(prompt)} {folder and folder.name}"
        print(f"{name}: {error:.4f} off, rounding in transformers {effect:.4f}")
        assert error < 1.5 * effect
        assert effect < 0.5


class _Layer(nn.Module):
    """Two modules that share their input, in a model without a head."""

    def __init__(self, linears: list[nn.Linear]) -> None:
        super().__init__()
        self.mlp = nn.ModuleDict(dict(zip(("gate_proj", "up_proj"), linears, strict=True)))

    def get_output_embeddings(self) -> None:
        return None


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [3, 64, 1500])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("is_sum", [False, True])
@torch.no_grad()
def test_a_projection_on_a_gpu_matches_float64(is_sum: bool, with_bias: bool, rows: int) -> None:
    """Rows of the base and of adapters; of the fp8 weight, and of the low-rank factors in bfloat16.

    With `is_sum` it is a term of a sum over ranks, of which there is one.
    """
    rng, cuda = np.random.default_rng(rows), torch.device("cuda")
    paged = paged_linear(rng, in_dim=96, widths=(64, 32), ranks=[[8, 8], [4, 0]], dtype=torch.bfloat16, device=cuda)
    linears = [nn.Linear(96, width, bias=with_bias).to(cuda, torch.bfloat16) for width in (64, 32)]
    expected_weight = rounded(torch.cat([linear.weight.detach().double() for linear in linears]).flatten()).view(-1, 96)
    names = ("mlp.gate_proj", "mlp.up_proj")
    shapes = {name: ModuleShape("linear", 96, width) for name, width in zip(names, (64, 32), strict=True)}
    geometry, layer = BaseGeometry(modules=shapes, dtype="bfloat16"), cast("PreTrainedModel", _Layer(linears))
    round_weights(layer, geometry, Ranks())
    pack_weights(layer, geometry)
    context = LoraContext()
    projection = FusedProjection(
        names, [*linears], paged.weights, context, place="body", is_head=False, ranks=Ranks(), is_sum=is_sum
    )
    x = torch.randn(rows, 96, device=cuda, dtype=torch.bfloat16)
    base = rounded(x.double()) @ expected_weight.t()
    if with_bias:
        base += torch.cat([linear.bias for linear in linears]).double()
    row_slots = rng.integers(-1, 2, rows).astype(np.int32)
    for slots in (None, row_slots):
        context.segments = None if slots is None else build_segments(slots, device=cuda)
        expected = base.cpu() if slots is None else base.cpu() + paged.delta(x, slots)
        y = projection(x)
        torch.testing.assert_close(y.double().cpu(), expected, rtol=2e-2, atol=3e-2)
        assert (y.double().cpu() - expected).norm() < 6e-3 * expected.norm()


async def test_what_cannot_be_rounded_is_refused(tmp_path: Path) -> None:
    base = make_base(
        tmp_path / "base", "llama", hidden_size=36, intermediate_size=36, num_attention_heads=2, head_dim=18
    )
    model = ModelConfig(id="base", source=str(base), quantization="fp8")
    with pytest.raises(UnsupportedModel, match="has no linear module that"):
        async with open_worker(Shelf(base), model=model):
            pass


@pytest.mark.gpu
async def test_another_dtype_is_refused_on_a_gpu(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "llama")
    model = ModelConfig(id="base", source=str(base), quantization="fp8", dtype="float16")
    with pytest.raises(WorkerConfigError, match="computed in bfloat16 on a GPU, not in float16"):
        async with open_worker(Shelf(base), model=model, device="cuda"):
            pass
