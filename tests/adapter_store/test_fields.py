"""Every field of LoraConfig: an adapter that PEFT made for it does what it does in PEFT, or is refused by its name."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lorafleet.adapter_store.errors import AdapterRefused
from lorafleet.adapter_store.manifest import AdapterWeights, magnitude_of
from lorafleet.adapter_store.peft_config import FIELDS
from lorafleet.adapter_store.peft_format import AdapterReader
from tests.adapter_store.conftest import AdapterCopy, Base
from tests.support.bases import BaseKind
from tests.support.fields import ACTIVATED, REFUSED, SERVED, FieldCase, make_converted, make_resized

INSTALLED = {field.name for field in dataclasses.fields(LoraConfig)}


def with_adapter(base: Path, weights: AdapterWeights) -> PreTrainedModel:
    """The base in float64 with all that the store read of an adapter done to its parameters."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
    model.set_output_embeddings(copy.deepcopy(model.get_output_embeddings()))  # it may be tied
    with torch.no_grad():
        for extra in weights.manifest.extras:
            array = torch.from_numpy(weights.extras[extra.name].astype(np.float64))
            if extra.kind == "replaced":
                parameter = model.get_parameter(extra.name)
                parameter.copy_(array.reshape(parameter.shape))
            elif extra.kind == "added":
                module = model.get_submodule(extra.name)
                own = torch.zeros(extra.width) if module.bias is None else module.bias
                module.bias = torch.nn.Parameter(own + array[0])
        for manifest in weights.manifest.modules:
            module = model.get_submodule(manifest.name)
            a, b = (torch.from_numpy(array.astype(np.float64)) for array in weights.tensors[manifest.name])
            delta = manifest.scaling * (a @ b if isinstance(module, torch.nn.Embedding) else b.T @ a)
            module.weight += delta.T if isinstance(module, Conv1D) else delta
            magnitude = weights.extras.get(magnitude_of(manifest.name))
            if magnitude is not None:
                axis = 0 if isinstance(module, torch.nn.Embedding | Conv1D) else 1
                scale = torch.from_numpy(magnitude.astype(np.float64)[0]) / module.weight.norm(dim=axis)
                module.weight *= scale.unsqueeze(axis)
    return model


def assert_does_as_peft(base: Base, folder: Path) -> AdapterWeights:
    """Every module alone, and the whole model on every token, compute what PEFT computes with the same folder."""
    weights = base.reader().read(folder)
    model = with_adapter(base.folder, weights)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        own = AutoModelForCausalLM.from_pretrained(base.folder, dtype=torch.float32)
        oracle = PeftModel.from_pretrained(own, folder).eval().double()
    generator = torch.Generator().manual_seed(0)
    changed = set()
    with torch.no_grad():
        plain = AutoModelForCausalLM.from_pretrained(base.folder, dtype=torch.float64)
        for name, shape in base.geometry.modules.items():
            if shape.kind == "embedding":
                given = torch.arange(shape.in_dim)
            else:
                given = torch.randn(5, shape.in_dim, dtype=torch.float64, generator=generator)
            outputs = [m.get_submodule(name)(given) for m in (model, oracle.get_base_model(), plain)]
            torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-6, atol=1e-6, msg=partial("{}: {}".format, name))
            if not torch.allclose(outputs[1], outputs[2]):
                changed.add(name)
        token_ids = torch.randperm(304, generator=generator).reshape(4, -1)
        logits = [m(token_ids).logits for m in (model, oracle, plain)]
        torch.testing.assert_close(logits[0], logits[1], rtol=1e-5, atol=1e-5)
        assert (logits[1] - logits[2]).abs().max() > 0.5, "the adapter changes next to nothing"
    touched = {module.name for module in weights.manifest.modules} | {
        extra.name.removesuffix(".weight").removesuffix(".lora_magnitude_vector") for extra in weights.manifest.extras
    }
    assert changed <= touched
    return weights


@pytest.mark.parametrize("case", SERVED.values(), ids=SERVED.keys())
def test_served_as_peft_does(base_for: Callable[[BaseKind], Base], case: FieldCase, tmp_path: Path) -> None:
    if not INSTALLED.issuperset(case.options):
        pytest.skip("the installed PEFT is older than this field")
    base = base_for(case.base)
    folder = case.make(tmp_path / "adapter", base.folder)
    weights = assert_does_as_peft(base, folder)
    base.reader().drop_base_copies(folder)
    again = base.reader().read(folder)
    assert again.manifest == weights.manifest
    assert weights.manifest.num_bytes == sum(
        array.nbytes for array in (*weights.extras.values(), *(t for pair in weights.tensors.values() for t in pair))
    )
    (size,) = {path.stat().st_size for path in folder.glob("*.safetensors")}
    assert size < base.reader().max_weights_bytes


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_converted_initialisations_are_served(base: Base, tmp_path: Path, init: str) -> None:
    assert_does_as_peft(base, make_converted(tmp_path, base.folder, init))


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED.keys())
def test_refused_by_its_name(base_for: Callable[[BaseKind], Base], case: FieldCase, tmp_path: Path) -> None:
    if not INSTALLED.issuperset(case.options):
        pytest.skip("the installed PEFT is older than this field")
    base = base_for(case.base)
    folder = case.make(tmp_path / "adapter", base.folder)
    with pytest.raises(AdapterRefused) as caught:
        base.reader().read(folder)
    assert caught.value.code == case.code
    if case.code in ("unsupported_field", "invalid_field", "rank_too_large"):
        assert (caught.value.param,) == case.fields
    if case.code in ("unsupported_field", "invalid_field"):
        assert case.fields[0] in caught.value.message


def test_every_field_of_the_installed_peft_has_its_rule() -> None:
    assert FIELDS.keys() >= INSTALLED
    assert all(rule.note for rule in FIELDS.values())


def test_every_field_that_is_served_or_refused_has_its_adapter() -> None:
    served = {name for case in (*SERVED.values(), *ACTIVATED.values()) for name in case.fields}
    refused = {name for case in REFUSED.values() for name in case.fields}
    assert served >= {name for name, rule in FIELDS.items() if rule.verdict == "served"}
    assert refused >= {name for name, rule in FIELDS.items() if rule.verdict == "refused"}


HARMLESS: dict[str, Any] = {
    "auto_mapping": {"base_model_class": "LlamaForCausalLM"},
    "base_model_name_or_path": "elsewhere/base",
    "corda_config": {"corda_method": "kpm"},
    "eva_config": {"rho": 2.0},
    "inference_mode": False,
    "loftq_config": {"loftq_bits": 4},
    "lora_dropout": 0.25,
    "lora_ga_config": {"direction": "random"},
    "megatron_core": "other.core",
    "monteclora_config": {"num_samples": 2},
    "peft_version": "0.1",
    "qalora_group_size": 4,
    "revision": "main",
    "runtime_config": {"ephemeral_gpu_offload": True},
    "velora_config": {"num_groups": 4},
}


@pytest.mark.parametrize("name", HARMLESS)
def test_harmless_fields_change_nothing(base: Base, copy_of: Callable[..., AdapterCopy], name: str) -> None:
    adapter = copy_of("rank4_qv")
    before = base.reader().read(adapter.folder).manifest
    adapter.set_config(**{name: HARMLESS[name]})
    assert base.reader().read(adapter.folder).manifest == before


def test_harmless_fields_are_all_tried() -> None:
    assert HARMLESS.keys() == {name for name, rule in FIELDS.items() if rule.verdict == "harmless"}


@pytest.mark.parametrize("num_tokens", [2, -2], ids=["added", "removed"])
@pytest.mark.parametrize("has_base", [True, False], ids=["base", "no-base"])
def test_lora_on_other_vocabularies_is_refused(base: Base, tmp_path: Path, num_tokens: int, has_base: bool) -> None:
    folder = make_resized(tmp_path / "adapter", base.folder, num_tokens, target_modules=["embed_tokens", "lm_head"])
    reader = base.reader() if has_base else AdapterReader(base.geometry, 64)
    with pytest.raises(AdapterRefused) as caught:
        reader.read(folder)
    assert caught.value.code == "vocabulary_resized"


NEEDS_BASE = ("bias-lora", "bias-all-norms", "tokens", "tokens-of-head")


@pytest.mark.parametrize("name", NEEDS_BASE)
def test_what_is_kept_beside_the_base_needs_it(base_for: Callable[[BaseKind], Base], name: str, tmp_path: Path) -> None:
    case = SERVED[name]
    base = base_for(case.base)
    folder = case.make(tmp_path / "adapter", base.folder)
    with pytest.raises(AdapterRefused) as caught:
        AdapterReader(base.geometry, 64).read(folder)
    assert caught.value.code == "base_weights_unverified"
