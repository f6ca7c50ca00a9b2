"""Names that wrappers of a model leave in a file are read back to PEFT's where exactly one reading fits them all."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from lorafleet.adapter_store.errors import AdapterRefused
from tests.adapter_store.conftest import AdapterCopy, Base
from tests.adapter_store.test_fields import assert_does_as_peft

PREFIX = "base_model.model."
Rule = Callable[[str], str]

WRAPPED: dict[str, Rule] = {
    "compiled": lambda name: f"_orig_mod.{name}",
    "compiled-inside": lambda name: name.replace(PREFIX, f"{PREFIX}_orig_mod."),
    "compiled-layers": lambda name: name.replace(".self_attn.", "._orig_mod.self_attn."),
    "parallel": lambda name: f"module.{name}",
    "parallel-compiled": lambda name: f"module._orig_mod.{name}",
    "fsdp": lambda name: "_fsdp_wrapped_module." + name.replace(".self_attn.", "._fsdp_wrapped_module.self_attn."),
    "checkpointing": lambda name: name.replace(".self_attn.", "._checkpoint_wrapped_module.self_attn."),
    "doubled": lambda name: PREFIX + name,
    "named": lambda name: name.replace(".weight", ".default.weight"),
    "otherwise-named": lambda name: name.replace(".weight", ".poems.weight"),
    "multimodal": lambda name: name.replace(PREFIX, f"{PREFIX}language_model."),
    "multimodal-inside": lambda name: name.replace(f"{PREFIX}model.", f"{PREFIX}model.language_model."),
    "trainer": lambda name: f"model.{name}",
    "text-model": lambda name: name.replace(f"{PREFIX}model.", f"{PREFIX}model.text_model."),
    "language-model": lambda name: name.replace(PREFIX, f"{PREFIX}llm."),
    "thinker": lambda name: name.replace(PREFIX, f"{PREFIX}thinker."),
    "bare-parallel": lambda name: "module." + name.removeprefix(PREFIX),
}


def rename(adapter: AdapterCopy, rule: Rule) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            tensors[rule(name)] = tensors.pop(name)

    adapter.change_tensors(change)


@pytest.mark.parametrize("rule", WRAPPED.values(), ids=WRAPPED.keys())
@pytest.mark.slow
def test_wrapped_names_are_the_same_adapter(base: Base, copy_of: Callable[..., AdapterCopy], rule: Rule) -> None:
    expected = assert_does_as_peft(base, copy_of("rank16", "plain").folder)
    adapter = copy_of("rank16", "wrapped")
    rename(adapter, rule)
    for _ in range(2):  # also as the store keeps it
        weights = base.reader().read(adapter.folder)
        assert weights.manifest == expected.manifest
        np.testing.assert_array_equal(weights.flat, expected.flat)
        base.reader().drop_base_copies(adapter.folder)


def test_copies_of_the_base_may_be_wrapped_too(base: Base, copy_of: Callable[..., AdapterCopy]) -> None:
    expected = base.reader().read(copy_of("embeddings_all", "plain").folder)
    adapter = copy_of("embeddings_all", "wrapped")
    rename(adapter, lambda name: f"module.{name}")
    base.reader().drop_base_copies(adapter.folder)
    assert base.reader().read(adapter.folder).manifest == expected.manifest


@pytest.mark.parametrize(
    "rule",
    [
        lambda name: name.replace(PREFIX, f"{PREFIX}decoder."),
        lambda name: name.replace(".weight", ".a.weight" if "q_proj" in name else ".b.weight"),
    ],
    ids=["unknown-wrapper", "two-adapters"],
)
def test_the_nearest_name_is_shown_where_none_fits(base: Base, copy_of: Callable[..., AdapterCopy], rule: Rule) -> None:
    adapter = copy_of("rank4_qv")
    rename(adapter, rule)
    with pytest.raises(AdapterRefused) as caught:
        base.reader().read(adapter.folder)
    wanted = f"{PREFIX}model.layers.0.self_attn.q_proj.lora_A.weight"
    assert (caught.value.code, caught.value.param) == ("missing_tensor", wanted)
    assert f"the nearest in the file is {rule(wanted)}" in caught.value.message


def test_names_that_collide_are_refused(base: Base, copy_of: Callable[..., AdapterCopy]) -> None:
    adapter = copy_of("rank4_qv")
    name = f"{PREFIX}model.layers.0.self_attn.q_proj.lora_A.weight"
    adapter.change_tensors(lambda tensors: tensors.update({f"module.{name}": tensors[name].clone()}))
    with pytest.raises(AdapterRefused) as caught:
        base.reader().read(adapter.folder)
    assert caught.value.code == "unmatched_tensor"
