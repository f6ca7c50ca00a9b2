"""Checkpoints that are quantised already, against PEFT on the weights that they stand for."""

from __future__ import annotations

import asyncio
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from lorafleet.workers.checkpoint import read_config
from lorafleet.workers.config import ModelConfig
from lorafleet.workers.errors import UnsupportedModel
from lorafleet.workers.model.loader import load_base
from lorafleet.workers.model.part_loader import load_part
from tests.support.adapters import make_adapter, randomise_adapter
from tests.support.bases import BaseKind, make_base, make_tokenizer
from tests.support.quantised import KINDS, write_mxfp4, write_quantised
from tests.workers.harness import Shelf, ask, assert_pefts, greedy, open_worker, random_prompt
from tests.workers.test_fp8_base import assert_rows_are_rounded
from tests.workers.test_mixtures import CASES, SIZES, assert_as_peft, load
from tests.workers.test_refusals import SHAPE
from tests.workers.test_sharding import shares_on

CPU = torch.device("cpu")


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_what_they_stand_for(base_of: Callable[[BaseKind], Path], kind: str, tmp_path: Path) -> None:
    write_quantised(base_of("llama"), kind, tmp_path / "quantised", tmp_path / "plain")
    model = ModelConfig(id="base", source=str(tmp_path / "quantised"))
    base = load_base(model, CPU)
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32)
    found = base.model.state_dict()
    assert found.keys() == expected.state_dict().keys()
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(found[name], value, rtol=1e-6, atol=0, msg=name)
    assert base.model.generation_config.to_dict() == expected.generation_config.to_dict()
    assert {name for name in base.geometry.modules if "k_proj" in name}


async def assert_served(quantised: Path, plain: Path, adapters: Path, dtype: str = "float32") -> None:
    """The usual adapters, in one batch with the base."""
    kinds: dict[str, tuple[str, dict[str, Any]]] = {
        "all": ("rank16", {}),
        "ends": ("embeddings_all", {"save_embedding_layers": True}),
        "dora": ("rank4_qv", {"use_dora": True}),
        "head": ("rank8_mlp", {"modules_to_save": ["lm_head"]}),
    }
    shelf = Shelf(quantised)
    versions: list[str | None] = [None]
    for name, (kind, options) in kinds.items():
        versions.append(shelf.put(make_adapter(adapters / name, plain, kind, **options)))
    shelf.base = plain
    prompts = [random_prompt(length, length) for length in (9, 33)]
    asked = [(version, prompt) for version in versions for prompt in prompts]
    model = ModelConfig(id="base", source=str(quantised))
    sampling = greedy(4, logprobs=0, prompt_logprobs=True)
    async with open_worker(shelf, model=model, prefix_cache=False) as worker:
        answers = await asyncio.gather(*(ask(worker, prompt, version, sampling) for version, prompt in asked))
    for (version, prompt), answer in zip(asked, answers, strict=True):
        assert_pefts(shelf, version, prompt, answer, 1e-4)


@pytest.mark.parametrize(
    "kind", ["fp8_rows", "int4_packed", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("fp8_blocks", "awq"))]
)
async def test_adapters_answer_as_pefts(base_of: Callable[[BaseKind], Path], kind: str, tmp_path: Path) -> None:
    write_quantised(base_of("llama"), kind, tmp_path / "quantised", tmp_path / "plain")
    await assert_served(tmp_path / "quantised", tmp_path / "plain", tmp_path)


@pytest.fixture(scope="module", params=["mixtral", "gpt_oss"])
def mixture(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A quantised mixture, and what its oracle loads."""
    folder = tmp_path_factory.mktemp(request.param)
    sizes = SHAPE | SIZES[request.param] | {"intermediate_size": 64}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(request.param, **sizes), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 1.2 * parameter.shape[-1] ** -0.5)
    model.save_pretrained(folder / "base")
    make_tokenizer().save_pretrained(folder / "base")
    if request.param == "mixtral":
        write_quantised(folder / "base", "fp8_rows", folder / "quantised", folder / "plain")
        return folder / "quantised", folder / "plain"
    write_mxfp4(folder / "base", folder / "quantised")
    return folder / "quantised", folder / "quantised"  # which transformers dequantises itself


@pytest.mark.parametrize("size", [1, pytest.param(2, marks=pytest.mark.slow)])
async def test_experts_answer_as_pefts(mixture: tuple[Path, Path], size: int, tmp_path: Path) -> None:
    quantised, plain = mixture
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = load.__wrapped__(plain)
        assert "experts.0" not in " ".join(name for name, _ in model.named_modules())
        peft = get_peft_model(model, LoraConfig(r=3, lora_alpha=6, task_type="CAUSAL_LM", **CASES["up"]))
    randomise_adapter(peft, 0.7)
    peft.save_pretrained(tmp_path / "up")
    shelf = Shelf(quantised)
    await assert_as_peft(shelf, {"up": tmp_path / "up"}, oracle=plain, size=size)


@pytest.mark.parametrize("kind", ["fp8_rows", "fp8_blocks", "gptq"])
def test_parts_of_all_ranks_are_the_base(base_of: Callable[[BaseKind], Path], kind: str, tmp_path: Path) -> None:
    write_quantised(base_of("llama"), kind, tmp_path / "quantised", tmp_path / "plain")
    model = ModelConfig(id="base", source=str(tmp_path / "quantised"))
    config = read_config(model)
    parts = [load_part(model, config, torch.float32, CPU, shares_on(config, rank, 2)) for rank in range(2)]
    plain = load_file(tmp_path / "plain" / "model.safetensors")
    for name, dim in (("q_proj", 0), ("o_proj", 1)):
        name = f"model.layers.0.self_attn.{name}.weight"
        torch.testing.assert_close(torch.cat([part.get_parameter(name) for part in parts], dim), plain[name])
        found: list[Any] = [
            getattr(part.get_submodule(name.removesuffix(".weight")), "fp8_scales", None) for part in parts
        ]
        if kind != "fp8_rows":
            assert found == [None, None]
            continue
        scales = load_file(tmp_path / "quantised" / "model.safetensors")[f"{name}_scale"].flatten().float()
        assert torch.equal(torch.cat(found), scales) if dim == 0 else all(torch.equal(one, scales) for one in found)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "bitsandbytes": ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "quantised by bitsandbytes, which is"),
    "no method": ({"load_in_4bit": True}, "quantised by None, which is not supported"),
    "nvfp4": ({"format": "nvfp4-pack-quantized"}, "in the format nvfp4-pack-quantized, which is not supported"),
    "two": (
        {"config_groups": {"a": {"format": "int-quantized"}, "b": {"format": "pack-quantized"}}},
        "several formats",
    ),
    "sparse": ({"sparsity_config": {"format": "sparse-24-bitmask"}}, r"sparse \(sparse-24-bitmask\)"),
    "rotated": ({"transform_config": {"config_groups": {"R1": {}}}}, "transforms of activations"),
    "frozen": ({"quantization_status": "frozen"}, "not compressed"),
    "gemv": ({"quant_method": "awq", "version": "gemv"}, "version gemv of 4 bits"),
    "three bits": ({"quant_method": "gptq", "bits": 3}, "format gptq of 3 bits"),
    "marlin": ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, "format marlin of 4 bits"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_other_formats_are_refused_by_name(case: str, tmp_path: Path) -> None:
    fields, message = REFUSED[case]
    config = AutoConfig.for_model("llama")
    config.quantization_config = KINDS["fp8_rows"][1] | fields if "quant_method" not in fields else fields
    if case == "no method":
        config.quantization_config = fields
    config.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModel, match=message):
        read_config(ModelConfig(id="base", source=str(tmp_path)))


def test_damaged_checkpoints_are_refused(base_of: Callable[[BaseKind], Path], tmp_path: Path) -> None:
    write_quantised(base_of("llama"), "fp8_rows", tmp_path / "quantised", tmp_path / "plain")
    path, model = (
        tmp_path / "quantised" / "model.safetensors",
        ModelConfig(id="base", source=str(tmp_path / "quantised")),
    )
    tensors, name = load_file(path), "model.layers.1.mlp.up_proj.weight"
    cases = [
        ({f"{name}_scale": None}, f"{name} has no scales"),
        ({f"{name}_scale": None, name: None}, f"lacks the weights {name}"),
        ({f"{name}_scale": tensors[f"{name}_scale"][:5]}, "not those of its config.json"),
        ({"model.norm.weight": tensors[name][0].clone().view(torch.float8_e5m2)}, "is kept as F8_E5M2"),
    ]
    for changes, message in cases:
        save_file({key: value for key, value in (tensors | changes).items() if value is not None}, path)
        with pytest.raises(UnsupportedModel, match=message):
            load_base(model, CPU)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["fp8_rows", "fp8_tensor"])
@pytest.mark.parametrize("base_kind", ["llama", "qwen2"])
async def test_a_gpu_multiplies_fp8_weights_as_they_are(base_kind: BaseKind, kind: str, tmp_path: Path) -> None:
    """With a scale for each output, or one for each of the modules that share an input."""
    base = make_base(tmp_path / "base", base_kind, dtype=torch.bfloat16, max_position_embeddings=2048)
    write_quantised(base, kind, tmp_path / "quantised", tmp_path / "plain")
    model = ModelConfig(id="base", source=str(tmp_path / "quantised"), dtype="bfloat16")
    loaded = load_base(model, torch.device("cuda"))
    assert loaded.multiplies_fp8
    for name, stored in load_file(tmp_path / "quantised" / "model.safetensors").items():
        if stored.dtype == torch.float8_e4m3fn:
            module = loaded.model.get_submodule(name.removesuffix(".weight"))
            assert torch.equal(module.weight.cpu().view(torch.uint8), stored.view(torch.uint8)), name
    del loaded
    await assert_rows_are_rounded(model, tmp_path / "plain", tmp_path)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["fp8_blocks", "int4_packed", "awq", "gptq"])
async def test_a_gpu_serves_others_dequantised(kind: str, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "llama")
    write_quantised(base, kind, tmp_path / "quantised", tmp_path / "plain")
    shelf = Shelf(tmp_path / "quantised")
    version = shelf.put(make_adapter(tmp_path / "a", tmp_path / "plain", "rank16"))
    shelf.base, prompt = tmp_path / "plain", random_prompt(33, 1)
    model = ModelConfig(id="base", source=str(tmp_path / "quantised"), dtype="float32")
    sampling = greedy(4, logprobs=0, prompt_logprobs=True)
    async with open_worker(shelf, model=model, device="cuda", prefix_cache=False) as worker:
        answers = await asyncio.gather(*(ask(worker, prompt, each, sampling) for each in (None, version)))
    for each, answer in zip((None, version), answers, strict=True):
        assert_pefts(shelf, each, prompt, answer, 2e-3)
