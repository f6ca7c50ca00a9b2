"""What of an adapter changes nothing is served as PEFT serves it, and said; a strict source refuses it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from lorafleet.adapter_store.errors import AdapterRefused
from lorafleet.adapter_store.service import AdapterStore
from lorafleet.adapter_store.source_config import DirectoryConfig
from tests.adapter_store.conftest import AdapterCopy, Base
from tests.adapter_store.test_fields import assert_does_as_peft

CONFIGS: dict[str, dict[str, Any]] = {
    "note": {"adapter_metadata": {"domain": "mathematics"}},
    "text": {"description": "made on a Monday"},
    "number": {"future_group_size": 16},
    "trainer": {"training_config": {"learning_rate": 1e-4}},
    "layers": {"num_hidden_layers": 2},
    "speed": {"use_flash_attention": True},
    "twin": {"lora_rank": 4},
    "task_type": {"task_type": "SEQ_2_SEQ_LM"},
    "target_modules": {"target_modules": ["q_proj", "v_proj", "c_attn"]},
    "modules_to_save": {"modules_to_save": ["classifier", "score"]},
}
"""What PEFT ignores, each named in its warning."""

NAMED = {
    "note": "adapter_metadata",
    "text": "description",
    "number": "future_group_size",
    "trainer": "training_config",
    "layers": "num_hidden_layers",
    "speed": "use_flash_attention",
    "twin": "lora_rank",
}


@pytest.mark.parametrize("label", CONFIGS)
def test_what_peft_ignores_is_a_warning(base: Base, copy_of: Callable[..., AdapterCopy], label: str) -> None:
    adapter = copy_of("rank4_qv")
    before = base.reader().read(adapter.folder).manifest
    assert before.warnings == ()
    adapter.set_config(**CONFIGS[label])
    manifest = assert_does_as_peft(base, adapter.folder).manifest
    assert manifest == before
    (warning,) = manifest.warnings
    assert NAMED.get(label, label) in warning


@pytest.mark.parametrize("label", CONFIGS)
async def test_a_strict_source_refuses_it(
    open_store: Callable[..., AdapterStore], copy_of: Callable[..., AdapterCopy], tmp_path: Path, label: str
) -> None:
    copy_of("rank4_qv").set_config(**CONFIGS[label])
    store = open_store(sources=[DirectoryConfig(name="disk", root=tmp_path / "adapters", strict=True)])
    with pytest.raises(AdapterRefused) as caught:
        await store.publish("disk", "a")
    assert caught.value.code in ("unsupported_field", "unknown_target")
    assert caught.value.param == NAMED.get(label, label)


def zero_b(tensors: dict[str, torch.Tensor]) -> None:
    tensors.update({name: -torch.zeros_like(tensor) for name, tensor in tensors.items() if ".lora_B." in name})


@pytest.mark.parametrize("why", ["lora_alpha is 0", "every A @ B is 0"])
def test_an_adapter_that_cannot_act_answers_as_the_base(
    base: Base, copy_of: Callable[..., AdapterCopy], why: str
) -> None:
    adapter = copy_of("rank4_qv")
    if why.startswith("lora_alpha"):
        adapter.set_config(lora_alpha=0)
    else:
        adapter.change_tensors(zero_b)
    (warning,) = base.reader().read(adapter.folder).manifest.warnings
    assert warning == f"{why}: the adapter answers as the base"
    model = AutoModelForCausalLM.from_pretrained(base.folder, dtype=torch.float32)
    token_ids = torch.arange(12)[None]
    plain = model(token_ids).logits
    assert torch.equal(PeftModel.from_pretrained(model, adapter.folder).eval()(token_ids).logits, plain)


async def test_files_beside_it_are_said_and_kept_over_a_restart(
    open_store: Callable[..., AdapterStore], copy_of: Callable[..., AdapterCopy]
) -> None:
    adapter = copy_of("rank4_qv")
    store = open_store()
    assert (await store.validate("disk", "a")).warnings == ()
    plain = await store.publish("disk", "a")
    (adapter.folder / "chat_template.jinja").write_text("{{ messages }}")
    adapter.set_config(description="x")
    manifest = await store.publish("disk", "a")
    assert manifest.version == plain.version
    assert [warning.split()[0] for warning in manifest.warnings] == ["description", "chat_template.jinja"]
    assert (await open_store().manifest(manifest.version)).warnings == manifest.warnings


async def test_a_first_request_is_told_which_adapter_is_refused(
    store: AdapterStore, copy_of: Callable[..., AdapterCopy]
) -> None:
    copy_of("rank4_qv", "poems").set_config(r=65)
    for _ in range(2):
        with pytest.raises(AdapterRefused, match=r"adapter poems: rank 65 .* raise adapters\.max_rank"):
            await store.resolve("poems")


def test_a_value_in_a_pattern_is_refused_with_its_key(base: Base, copy_of: Callable[..., AdapterCopy]) -> None:
    adapter = copy_of("rank4_qv")
    adapter.set_config(rank_pattern={"q_proj": 4, "v_proj": 0})
    with pytest.raises(AdapterRefused, match=r"rank_pattern\['v_proj'\] is 0"):
        base.reader().read(adapter.folder)
