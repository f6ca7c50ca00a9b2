"""Adapters on the experts and routers of mixtures answer as PEFT does, in one batch with others."""

from __future__ import annotations

import asyncio
import json
import shutil
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from lorafleet.adapter_store.errors import AdapterRefused
from lorafleet.adapter_store.manifest import Dtype
from lorafleet.workers.config import ModelConfig
from lorafleet.workers.model.expert_layers import every_product, grouped_product
from tests.support.adapters import randomise_adapter
from tests.support.bases import make_tokenizer
from tests.workers.harness import Shelf, ask, greedy, open_worker, random_prompt
from tests.workers.test_refusals import LLAMA4, SHAPE
from tests.workers.test_replayed_steps import BY_ROW, replay

EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
SIZES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8},
    "llama4_text": {**LLAMA4, "num_local_experts": 3, "attention_chunk_size": 64},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8, "layer_types": ["full_attention"] * 2},
}
CASES: dict[str, dict[str, Any]] = {
    "both": {"target_modules": [], "target_parameters": EXPERTS},
    "up": {"target_modules": ["q_proj"], "target_parameters": EXPERTS[:1]},
    "down": {"target_modules": ["q_proj"], "target_parameters": EXPERTS[1:], "use_rslora": True},
    "all-linear": {"target_modules": "all-linear"},
    "attention": {"target_modules": ["q_proj", "v_proj"]},
}
"""What PEFT puts on a mixture; `all-linear` means experts and routers where transformers has joined them."""


@pytest.fixture(scope="module", params=SIZES)
def shelf(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shelf]:
    """A tiny mixture with loud random weights, and the cases' adapters in folders beside it."""
    folder = tmp_path_factory.mktemp(request.param)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(request.param, **SHAPE | SIZES[request.param]), dtype=torch.float32
    )
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 1.2 * parameter.shape[-1] ** -0.5)
    model.save_pretrained(folder / "base")
    make_tokenizer().save_pretrained(folder / "base")
    for name, fields in CASES.items():
        if (request.param, name) == ("llama4_text", "all-linear"):
            continue  # its router is a linear module that PEFT cannot compute
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            plain = load.__wrapped__(folder / "base")
            peft = get_peft_model(plain, LoraConfig(r=3, lora_alpha=6, task_type="CAUSAL_LM", **fields))
        randomise_adapter(peft, 0.7)
        peft.save_pretrained(folder / name)
    yield Shelf(folder / "base")
    load.cache_clear()


@cache
def load(folder: Path, adapter: Path | None = None) -> PreTrainedModel | PeftModel:
    # transformers 5.17 dequantises MXFP4 to bfloat16, whatever it is asked for.
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).float().eval()
    return model if adapter is None else PeftModel.from_pretrained(model, adapter).eval()


@torch.no_grad()
def logprobs(model: PreTrainedModel | PeftModel, prompt: tuple[int, ...]) -> torch.Tensor:
    """(tokens - 1,): of each token after those before it."""
    logits: torch.Tensor = model(input_ids=torch.tensor([prompt]), use_cache=False).logits[0]
    return logits.log_softmax(-1)[:-1].gather(1, torch.tensor(prompt[1:])[:, None])[:, 0]


async def assert_as_peft(
    shelf: Shelf, folders: dict[str, Path], oracle: Path | None = None, num_tokens: int = 1, size: int = 1
) -> list[tuple[int, ...]]:
    """Ask for prompts with the base and with all adapters at once, and return the tokens of the answers.

    `oracle`: the base that PEFT loads, if another. `size`: ranks of the worker.
    """
    oracle = oracle or shelf.base
    versions: dict[str | None, str | None] = {None: None, **{name: shelf.put(path) for name, path in folders.items()}}
    questions = [(name, random_prompt(length, length)) for length in (23, 7) for name in versions]
    sampling = greedy(num_tokens, prompt_logprobs=True)
    async with open_worker(shelf, max_batch_tokens=32, tensor_parallel_size=size) as worker:
        answers = await asyncio.gather(*(ask(worker, prompt, versions[name], sampling) for name, prompt in questions))
    plain = load(oracle)
    for (name, prompt), answer in zip(questions, answers, strict=True):
        given = [delta.prompt_logprobs for delta in answer.deltas if delta.prompt_logprobs]
        got = torch.tensor([entry.logprob for part in given for entry in part][1:])
        expected = logprobs(plain if name is None else load(oracle, folders[name]), prompt)
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=0, msg=f"{name}, {len(prompt)} tokens")
        assert name is None or float((expected - logprobs(plain, prompt)).abs().max()) > 0.05, "it does nothing"
    return [answer.tokens for answer in answers]


MIXTRAL = pytest.mark.parametrize("shelf", ["mixtral"], indirect=True)


async def test_experts_and_routers(shelf: Shelf) -> None:
    folders = {name: shelf.base.parent / name for name in CASES}
    await assert_as_peft(shelf, {name: folder for name, folder in folders.items() if folder.exists()})


@pytest.mark.parametrize(
    "shelf",
    ["mixtral", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("qwen3_moe", "gpt_oss"))],
    indirect=True,
)
async def test_experts_of_several_ranks(shelf: Shelf) -> None:
    """Each rank has some of the experts, and of an adapter what is on those."""
    folders = {name: shelf.base.parent / name for name in CASES}
    alone = await assert_as_peft(shelf, folders, num_tokens=12)
    assert await assert_as_peft(shelf, folders, num_tokens=12, size=2) == alone


@MIXTRAL
async def test_in_graphs(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps are padded to the forms of graphs."""
    replayed = replay(monkeypatch, BY_ROW)
    await assert_as_peft(shelf, {name: shelf.base.parent / name for name in ("both", "all-linear")})
    assert replayed
    assert not all(header.skips_experts for header in replayed)


@MIXTRAL
async def test_in_graphs_without_lora_on_experts(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    replayed = replay(monkeypatch, BY_ROW)
    await assert_as_peft(shelf, {"attention": shelf.base.parent / "attention"})
    with_lora = [header for header in replayed if header.segments.num_lora_chunks]
    assert with_lora
    assert all(header.form is not None and header.form.skips_experts for header in with_lora)


def by_expert(shelf: Shelf, folder: Path) -> Path:
    """An adapter as PEFT saved it before transformers 5, with linear modules in each expert."""
    config = json.loads((shelf.base / "config.json").read_text())
    is_mixtral = config["model_type"] == "mixtral"
    names = ("w1", "w3", "w2") if is_mixtral else ("gate_proj", "up_proj", "down_proj")
    hidden, inner = 32, 48 if is_mixtral else 16
    block = "block_sparse_moe" if is_mixtral else "mlp"
    count = config.get("num_local_experts") or config["num_experts"]
    shapes = {f"model.layers.{layer}.self_attn.q_proj": (hidden, hidden) for layer in range(2)}
    for layer in range(2):
        shapes[f"model.layers.{layer}.{block}.gate"] = (hidden, count)
        for expert in range(count):
            for name, shape in zip(names, [(hidden, inner)] * 2 + [(inner, hidden)], strict=True):
                shapes[f"model.layers.{layer}.{block}.experts.{expert}.{name}"] = shape
    torch.manual_seed(3)
    tensors = {}
    for module, (in_dim, out_dim) in shapes.items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = torch.randn(3, in_dim) * in_dim**-0.5
        tensors[f"base_model.model.{module}.lora_B.weight"] = torch.randn(out_dim, 3) * 0.4
    shutil.copytree(shelf.base.parent / "up", folder)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text())
    config |= {"target_modules": ["q_proj", "gate", *names], "target_parameters": None, "lora_dropout": 0.0}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("shelf", ["mixtral", "qwen3_moe"], indirect=True)
async def test_experts_one_by_one(shelf: Shelf, tmp_path: Path) -> None:
    folders = {"names": by_expert(shelf, tmp_path / "names"), "regex": by_expert(shelf, tmp_path / "regex")}
    path = folders["regex"] / "adapter_config.json"
    config = json.loads(path.read_text())
    config["target_modules"] = rf".*\.({'|'.join(config['target_modules'])})"
    path.write_text(json.dumps(config))
    # The version is that of what is computed, however a config says it.
    assert shelf.put(folders["names"]) == shelf.put(folders["regex"])
    await assert_as_peft(shelf, folders)


@pytest.mark.parametrize("product", [grouped_product, every_product])
def test_products_by_group(product: Callable[..., torch.Tensor]) -> None:
    generator = torch.Generator().manual_seed(0)
    x, matrices = torch.randn(9, 6, generator=generator), torch.randn(4, 6, 5, generator=generator)
    ends = torch.tensor([2, 2, 7, 8], dtype=torch.int32)
    y = product(x, matrices, ends)
    for row, owner in enumerate([0, 0, 2, 2, 2, 2, 2, 3]):
        torch.testing.assert_close(y[row], x[row] @ matrices[owner])
    assert not y[8].any()


@pytest.mark.gpu
async def test_on_a_gpu(shelf: Shelf) -> None:
    """In captured graphs and in prompts, in bfloat16 and in float32."""
    names = [name for name in CASES if (shelf.base.parent / name).exists()]
    prompt = random_prompt(23, 1)
    bars: dict[Dtype, float] = {"float32": 2e-3, "bfloat16": 0.3}
    for dtype, bar in bars.items():
        own = Shelf(shelf.base, dtype=dtype)
        versions = [own.put(shelf.base.parent / name) for name in names]
        model = ModelConfig(id="base", source=str(shelf.base), dtype=dtype)
        async with open_worker(own, model=model, device="cuda") as worker:
            answers = await asyncio.gather(
                *(ask(worker, prompt, version, greedy(5, prompt_logprobs=True)) for version in versions)
            )
        for name, answer in zip(names, answers, strict=True):
            given = [delta.prompt_logprobs for delta in answer.deltas if delta.prompt_logprobs]
            got = torch.tensor([entry.logprob for part in given for entry in part][1:])
            wanted = logprobs(load(shelf.base, shelf.base.parent / name), prompt)
            assert float((got - wanted).abs().mean()) < bar, (name, dtype)


REFUSED: dict[str, tuple[Callable[[dict[str, Any]], dict[str, Any]], str]] = {
    "one of two": (lambda config: {"target_modules": ["q_proj", "w1"]}, "the base has them as one"),
    "norm": (lambda config: {"target_parameters": [*EXPERTS, "input_layernorm.weight"]}, "LoRA cannot be on here"),
    "none": (lambda config: {"target_modules": [], "target_parameters": ["up.weight"]}, "no parameter that LoRA"),
    "dora": (lambda config: {"use_dora": True}, "target_parameters and use_dora"),
    "shape": (lambda config: {"r": 2}, "has shape"),
    "kind": (lambda config: {"target_parameters": "experts"}, "a list of parameter names"),
}


@pytest.mark.parametrize("name", REFUSED)
@MIXTRAL
def test_what_is_refused(shelf: Shelf, tmp_path: Path, name: str) -> None:
    change, why = REFUSED[name]
    shutil.copytree(shelf.base.parent / "both", tmp_path / "a")
    path = tmp_path / "a" / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | change(config)))
    with pytest.raises(AdapterRefused, match=why):
        shelf.put(tmp_path / "a")


@MIXTRAL
def test_what_is_excluded_may_be_named(shelf: Shelf, tmp_path: Path) -> None:
    """As `all-linear` with `exclude_modules` is saved: PEFT writes the names that it stands for."""
    shutil.copytree(shelf.base.parent / "attention", tmp_path / "a")
    path = tmp_path / "a" / "adapter_config.json"
    config = json.loads(path.read_text()) | {"target_modules": ["q_proj", "v_proj", "experts"]}
    path.write_text(json.dumps(config))
    with pytest.raises(AdapterRefused, match="LoRA cannot be on here: experts"):
        shelf.put(tmp_path / "a")
    for excluded in (["experts"], ["mlp.experts"], r".*\.experts"):
        path.write_text(json.dumps(config | {"exclude_modules": excluded}))
        manifest = shelf.weights[shelf.put(tmp_path / "a")].manifest
        assert {module.name.rpartition(".")[2] for module in manifest.modules} == {"q_proj", "v_proj"}


@MIXTRAL
def test_a_parameter_that_is_not_there_is_a_warning(shelf: Shelf, tmp_path: Path) -> None:
    shutil.copytree(shelf.base.parent / "both", tmp_path / "a")
    path = tmp_path / "a" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"target_parameters": [*EXPERTS, "mlp.other"]}))
    manifest = shelf.weights[shelf.put(tmp_path / "a")].manifest
    assert manifest.warnings == ("target_parameters names what the base has no module of: mlp.other",)


@MIXTRAL
def test_a_missing_expert_is_named(shelf: Shelf, tmp_path: Path) -> None:
    folder = by_expert(shelf, tmp_path / "single")
    tensors = load_file(folder / "adapter_model.safetensors")
    gone = next(name for name in tensors if ".experts.3." in name and "lora_B" in name)
    del tensors[gone]
    save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(AdapterRefused) as caught:
        shelf.put(folder)
    assert caught.value.code == "missing_tensor"
    assert gone.partition("experts.")[2] in caught.value.message
