"""Adapters whose files have the names of the base's checkpoint, where transformers gives other ones on load."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, GPTNeoXConfig

from lorafleet.adapter_store.errors import AdapterRefused
from lorafleet.workers.model import geometry
from tests.adapter_store.conftest import AdapterCopy, Base
from tests.adapter_store.test_fields import assert_does_as_peft
from tests.support.adapters import make_adapter

PREFIX = "base_model.model."


@pytest.fixture(scope="module")
def neox(tmp_path_factory: pytest.TempPathFactory) -> Base:
    folder = tmp_path_factory.mktemp("neox") / "base"
    shape = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(GPTNeoXConfig(vocab_size=304, **shape))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 1.5 * parameter.shape[-1] ** -0.5)
    model.save_pretrained(folder)
    assert "embed_out.weight" in load_file(folder / "model.safetensors")
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    return Base(folder, geometry.geometry_of(empty, "float32"))


@pytest.fixture
def copy_for(neox: Base, tmp_path: Path) -> Callable[..., AdapterCopy]:
    """An adapter that PEFT made, by the names that the model has, and a copy of it to be changed."""

    def of(name: str, **options: Any) -> AdapterCopy:
        options = {"target_modules": ["query_key_value", "lm_head"], **options}
        made = make_adapter(tmp_path / "made", neox.folder, "rank4_qv", **options)
        shutil.copytree(made, tmp_path / name)
        return AdapterCopy(tmp_path / name)

    return of


def as_in_checkpoint(adapter: AdapterCopy, *, prefix: str = "") -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            tensors[prefix + name.replace("lm_head", "embed_out")] = tensors.pop(name)

    adapter.change_tensors(change)


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize(
    ("options", "edit"),
    [
        ({}, {}),
        ({}, {"target_modules": ["query_key_value", "embed_out"]}),
        ({"modules_to_save": ["lm_head"]}, {"modules_to_save": ["embed_out"]}),
        (
            {"target_modules": ["query_key_value"], "trainable_token_indices": {"lm_head": [3, 7]}},
            {"trainable_token_indices": {"embed_out": [3, 7]}},
        ),
    ],
    ids=["tensors", "target", "save", "tokens"],
)
def test_names_of_the_checkpoint(
    neox: Base, copy_for: Callable[..., AdapterCopy], options: dict[str, Any], edit: dict[str, Any], prefix: str
) -> None:
    """Such an adapter is of a time when the model had its checkpoint's names."""
    options = {"target_modules": ["query_key_value"], **options} if options else options
    adapter = copy_for("a", **options)
    expected = assert_does_as_peft(neox, adapter.folder)
    as_in_checkpoint(adapter, prefix=prefix)
    adapter.set_config(**edit)
    for _ in range(2):  # also as the store keeps it
        found = neox.reader().read(adapter.folder)
        assert found.manifest == expected.manifest
        np.testing.assert_array_equal(found.flat, expected.flat)
        assert not found.manifest.warnings
        neox.reader().drop_base_copies(adapter.folder)


def test_copies_by_the_checkpoints_names(neox: Base, copy_for: Callable[..., AdapterCopy]) -> None:
    own = load_file(neox.folder / "model.safetensors")
    adapter = copy_for("a", target_modules=["query_key_value"])
    expected = neox.reader().read(adapter.folder)
    copies = ("embed_out.weight", "gpt_neox.layers.1.mlp.dense_4h_to_h.bias", "gpt_neox.final_layer_norm.weight")
    adapter.change_tensors(lambda tensors: tensors.update({f"{PREFIX}{name}": own[name].clone() for name in copies}))
    assert neox.reader().read(adapter.folder).manifest == expected.manifest
    neox.reader().drop_base_copies(adapter.folder)
    assert len(load_file(adapter.folder / "adapter_model.safetensors")) == 2 * len(expected.manifest.modules)
    changed = f"{PREFIX}gpt_neox.layers.1.mlp.dense_4h_to_h.bias"
    adapter.change_tensors(lambda tensors: tensors.update({changed: own[copies[1]] + 1}))
    with pytest.raises(AdapterRefused, match="is not one that an adapter can replace here") as caught:
        neox.reader().read(adapter.folder)
    assert (caught.value.code, caught.value.param) == ("base_weights_changed", changed)


def test_both_names_at_once_are_refused(neox: Base, copy_for: Callable[..., AdapterCopy]) -> None:
    adapter = copy_for("a")
    name = f"{PREFIX}lm_head.lora_A.weight"
    adapter.change_tensors(
        lambda tensors: tensors.update({name.replace("lm_head", "embed_out"): tensors[name].clone()})
    )
    with pytest.raises(AdapterRefused) as caught:
        neox.reader().read(adapter.folder)
    assert caught.value.code == "unmatched_tensor"


def test_a_name_that_the_base_has_stays(neox: Base, copy_for: Callable[..., AdapterCopy]) -> None:
    """`embed` is part of other names, which have their own meaning."""
    adapter = copy_for("a", target_modules=["query_key_value"])
    adapter.set_config(target_modules=["query_key_value", "embed_ou", "out"])
    (warning,) = neox.reader().read(adapter.folder).manifest.warnings
    assert "embed_ou, out" in warning
    assert json.loads((adapter.folder / "adapter_config.json").read_text())["target_modules"][1] == "embed_ou"
