"""What the store reads from an adapter is what PEFT computes with it."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lorafleet.adapter_store.manifest import BaseGeometry, Dtype
from lorafleet.adapter_store.peft_config import LoraSpec, read_config
from lorafleet.adapter_store.peft_format import AdapterReader
from lorafleet.adapter_store.targets import effective_modules
from tests.adapter_store.conftest import AdapterCopy, Base
from tests.support.adapters import make_adapter


def test_arrays_are_read_only_and_wide_side_contiguous(base: Base, adapter_of: Callable[..., Path]) -> None:
    weights = base.reader().read(adapter_of("embeddings_all"))
    for module in weights.manifest.modules:
        shape = base.geometry.modules[module.name]
        a, b = weights.tensors[module.name]
        is_embedding = shape.kind == "embedding"
        assert a.shape == ((shape.in_dim, module.rank) if is_embedding else (module.rank, shape.in_dim))
        assert b.shape == (module.rank, shape.out_dim)
        for array in (a, b):
            assert array.flags.c_contiguous
            assert not array.flags.writeable
            assert array.dtype == np.float32
    assert weights.manifest.num_bytes == sum(a.nbytes + b.nbytes for a, b in weights.tensors.values())
    assert weights.manifest.rank == max(module.rank for module in weights.manifest.modules)
    assert weights.manifest.targets == tuple(sorted({name.rpartition(".")[2] for name in weights.tensors}))


@pytest.mark.parametrize("stored", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("served", ["float32", "float16", "bfloat16"])
def test_weights_are_rounded_as_torch_does(
    base: Base, copy_of: Callable[..., AdapterCopy], stored: torch.dtype, served: Dtype
) -> None:
    adapter = copy_of("rank4_qv")
    adapter.change_tensors(lambda tensors: tensors.update({name: t.to(stored) for name, t in tensors.items()}))
    geometry = BaseGeometry(base.geometry.modules, served)
    weights = AdapterReader(geometry, 64).read(adapter.folder)
    tensors = load_file(adapter.folder / "adapter_model.safetensors")
    dtype = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}[served]
    for name, (a, _) in weights.tensors.items():
        expected = tensors[f"base_model.model.{name}.lora_A.weight"].to(dtype)
        bits = expected.view(torch.uint16).numpy() if served == "bfloat16" else expected.numpy()
        np.testing.assert_array_equal(a, bits)


MATCHES: dict[str, dict[str, Any]] = {
    "list": {"target_modules": ["q_proj", "down_proj"]},
    "list_of_longer_ends": {"target_modules": ["self_attn.q_proj", "1.mlp.up_proj"]},
    "full_name": {"target_modules": ["model.layers.1.self_attn.q_proj"]},
    "regex": {"target_modules": r".*\.layers\.\d+\.self_attn\.(q|v)_proj"},
    "regex_must_match_all": {"target_modules": r"model\.layers\.0\.mlp\.\w+_proj|lm_head"},
    "all_linear": {"target_modules": "all-linear"},
    "all_linear_capitals": {"target_modules": "All-Linear"},
    "embeddings": {"target_modules": ["embed_tokens", "lm_head", "q_proj"]},
    "exclude_list": {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["0.self_attn.q_proj"]},
    "exclude_regex": {"target_modules": ["q_proj", "v_proj"], "exclude_modules": r"model\.layers\.0\..*"},
    "exclude_from_all_linear": {"target_modules": "all-linear", "exclude_modules": ["down_proj"]},
    "layer_int": {"target_modules": ["q_proj"], "layers_to_transform": 1},
    "layer_zero": {"target_modules": ["q_proj"], "layers_to_transform": 0},
    "layer_list": {"target_modules": ["q_proj", "o_proj"], "layers_to_transform": [0]},
    "layer_list_empty": {"target_modules": ["q_proj"], "layers_to_transform": []},
    "layers_and_full_name": {
        "target_modules": ["q_proj", "model.layers.0.mlp.up_proj"],
        "layers_to_transform": [1],
    },
    "layers_and_head": {"target_modules": ["q_proj", "lm_head"], "layers_to_transform": [1]},
    "layers_pattern": {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
    "layers_patterns": {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": ["h", "la.ers"]},
    "rank_pattern": {
        "target_modules": ["q_proj", "v_proj"],
        "rank_pattern": {"q_proj": 3, "layers.1.self_attn.v_proj": 5},
    },
    "rank_pattern_first_wins": {
        "target_modules": ["q_proj"],
        "rank_pattern": {r"layers\.1\..*": 2, "q_proj": 3, "^model.layers.0.self_attn.q_proj": 4},
    },
    "rank_pattern_anchored": {"target_modules": ["q_proj"], "rank_pattern": {r"^model\.layers\.0.*": 2, "proj": 9}},
    "alpha_pattern": {
        "target_modules": ["q_proj", "up_proj"],
        "alpha_pattern": {"up_proj": 1, r".*\.q_proj": 5},
        "rank_pattern": {"up_proj": 2},
    },
    "rslora_patterns": {
        "target_modules": ["q_proj", "up_proj"],
        "use_rslora": True,
        "alpha_pattern": {"up_proj": 3},
        "rank_pattern": {"up_proj": 2},
    },
}


def spec_of(config: LoraConfig, folder: Path) -> LoraSpec:
    config.save_pretrained(str(folder))
    return read_config(folder / "adapter_config.json")


@pytest.mark.parametrize("fields", MATCHES.values(), ids=MATCHES.keys())
def test_modules_ranks_and_scalings_are_pefts(base: Base, fields: dict[str, Any], tmp_path: Path) -> None:
    spec = spec_of(LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=6, **fields), tmp_path)
    model = AutoModelForCausalLM.from_pretrained(base.folder)
    peft_model = get_peft_model(model, LoraConfig.from_pretrained(str(tmp_path)))
    expected = {
        name: (module.r["default"], module.scaling["default"])
        for name, module in peft_model.get_base_model().named_modules()
        if isinstance(module, LoraLayer)
    }
    found = {module.name: (module.rank, module.scaling) for module in effective_modules(spec, base.geometry)}
    assert found == expected


@pytest.mark.parametrize("change", ["dropout", "key_order", "indent", "base_name", "tensor_order", "metadata", "fan"])
def test_version_does_not_depend_on_form(base: Base, copy_of: Callable[..., AdapterCopy], change: str) -> None:
    before = base.reader().read(copy_of("rank_pattern", "before").folder).manifest
    adapter = copy_of("rank_pattern", "after")
    config = adapter.folder / "adapter_config.json"
    fields = json.loads(config.read_text())
    weights = adapter.folder / "adapter_model.safetensors"
    match change:
        case "dropout":
            adapter.set_config(lora_dropout=0.25, inference_mode=False, peft_version="0.1")
        case "key_order":
            config.write_text(json.dumps(dict(reversed(list(fields.items())))))
        case "indent":
            config.write_text(json.dumps(fields, indent=7))
        case "base_name":
            adapter.set_config(base_model_name_or_path="/somewhere/else", revision="main")
        case "tensor_order":
            tensors = load_file(weights)
            save_file({name: tensors[name] for name in reversed(tensors)}, weights)
        case "metadata":
            save_file(load_file(weights), weights, metadata={"format": "pt", "made by": "x" * 1000})
        case "fan":
            adapter.set_config(fan_in_fan_out=True)
    assert base.reader().read(adapter.folder).manifest == before


def test_the_same_in_other_words_is_the_same_version(base: Base, copy_of: Callable[..., AdapterCopy]) -> None:
    before = base.reader().read(copy_of("rank4_qv", "before").folder).manifest
    adapter = copy_of("rank4_qv", "after")
    adapter.set_config(target_modules=r".*\.(v|q)_proj", r=9, rank_pattern={"q_proj": 4, "v_proj": 4}, lora_alpha=8)
    assert base.reader().read(adapter.folder).manifest.version == before.version


@pytest.mark.parametrize("change", ["alpha", "bit", "rslora", "dtype", "seed"])
def test_version_depends_on_all_that_is_computed_with(
    base: Base, copy_of: Callable[..., AdapterCopy], change: str
) -> None:
    before = base.reader().read(copy_of("rank16", "before").folder).manifest.version
    adapter = copy_of("rank16", "after", seed=2) if change == "seed" else copy_of("rank16", "after")
    match change:
        case "alpha":
            adapter.set_config(lora_alpha=25)
        case "rslora":
            adapter.set_config(use_rslora=True)
        case "bit":
            weights = adapter.folder / "adapter_model.safetensors"
            content = bytearray(weights.read_bytes())
            content[-4] ^= 1
            weights.write_bytes(content)
        case "dtype":
            adapter.change_tensors(lambda tensors: tensors.update({k: v.half() for k, v in tensors.items()}))
    assert base.reader().read(adapter.folder).manifest.version != before


def test_base_copies_are_dropped_from_what_is_kept(base: Base, copy_of: Callable[..., AdapterCopy]) -> None:
    adapter = copy_of("embeddings")
    before = base.reader().read(adapter.folder).manifest
    base.reader().drop_base_copies(adapter.folder)
    names = load_file(adapter.folder / "adapter_model.safetensors").keys()
    assert all(".lora_" in name for name in names)
    assert AdapterReader(base.geometry, 64).read(adapter.folder).manifest == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_base_copies_may_be_rounded(base: Base, copy_of: Callable[..., AdapterCopy], dtype: torch.dtype) -> None:
    adapter = copy_of("embeddings")

    def round_copies(tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            if "base_layer" in name:
                tensors[name] = tensor.to(dtype)
                if name.startswith("base_model.model.lm_head"):
                    tensors[name] = tensors[name].float()

    adapter.change_tensors(round_copies)
    base.reader().read(adapter.folder)


def test_embeddings_saved_though_not_targeted_are_compared_too(base: Base, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapter = make_adapter(tmp_path / "adapter", base.folder, "rank4_qv", save_embedding_layers=True)
    assert any(name.endswith("embed_tokens.weight") for name in load_file(adapter / "adapter_model.safetensors"))
    assert len(base.reader().read(adapter).tensors) == 4
