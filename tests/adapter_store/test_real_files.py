"""Files as people and their tools leave them: served as PEFT serves them, or refused by what is wrong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lorafleet.adapter_store.errors import AdapterRefused
from lorafleet.adapter_store.patterns import Pattern, match_patterns
from tests.adapter_store.conftest import AdapterCopy, Base
from tests.adapter_store.test_fields import assert_does_as_peft
from tests.support.adapters import ALL_SEVEN, make_adapter, randomise_adapter
from tests.support.bases import BaseKind

CONFIG, WEIGHTS, PREFIX = "adapter_config.json", "adapter_model.safetensors", "base_model.model."
INNER = "self_attn|attention|attn|mixer|mlp|feed_forward|ffn|dense|mixer"
NAMES = "q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj"
UNSLOTH = {
    "plain": rf"(?:.*?(?:language|text).*?(?:{INNER}).*?(?:{NAMES}).*?)|"
    rf"(?:\bmodel\.layers\.[\d]{{1,}}\.(?:{INNER})\.(?:(?:{NAMES})))",
    "lookahead": rf"(?:.*?(?:language|text).*?(?:{INNER}).*?\.(?:q_proj|v_proj|o_proj))|"
    rf"(?:\bmodel\.layers\.[\d]{{1,}}(?!.*\.experts\.\d)\..*?(?:{INNER}).*?\.(?:(?:q_proj|v_proj|o_proj)))",
}
MERGEKIT = {
    "r": 16,
    "lora_alpha": 16,
    "target_modules": ("embed_tokens", "lm_head", *ALL_SEVEN),
    "rank_pattern": {"model.embed_tokens": 12, "lm_head": 9, "model.layers.0.self_attn.k_proj": 3},
    "alpha_pattern": {"model.embed_tokens": 12, "lm_head": 9, "model.layers.0.self_attn.k_proj": 3},
    "modules_to_save": ("input_layernorm", "post_attention_layernorm", "norm"),
}
AXOLOTL = r".*\.layers\.1\..*(q_proj|k_proj|v_proj|o_proj)$"

MADE: dict[str, tuple[BaseKind, dict[str, Any]]] = {
    "unsloth": ("qwen2", {"target_modules": UNSLOTH["plain"]}),
    "unsloth-lookahead": ("qwen2", {"target_modules": UNSLOTH["lookahead"]}),
    "mergekit": ("llama", MERGEKIT),
    "axolotl": (
        "qwen3",
        {
            "target_modules": ALL_SEVEN,
            "rank_pattern": {AXOLOTL: 32},
            "alpha_pattern": {AXOLOTL: 128.0, "^model.layers.0.mlp": 3},
        },
    ),
    "upper-layers": ("mistral", {"target_modules": ALL_SEVEN, "layers_to_transform": [1]}),
}
"""Options of LoraConfig as such tools set them."""


@pytest.mark.parametrize(("kind", "options"), MADE.values(), ids=MADE.keys())
def test_options_as_tools_set_them(
    base_for: Callable[[BaseKind], Base], tmp_path: Path, kind: BaseKind, options: dict[str, Any]
) -> None:
    base = base_for(kind)
    assert_does_as_peft(base, make_adapter(tmp_path / "a", base.folder, "rank4_qv", **options))


def test_such_patterns_are_fast_enough_for_a_large_base() -> None:
    names = [f"model.layers.{n}.{part}" for n in range(60) for part in ("self_attn.q_proj", "mlp.up_proj")]
    names += [f"model.layers.{n}.mlp.experts.{e}.up_proj" for n in range(60) for e in range(128)]
    (hits,) = match_patterns([Pattern("fullmatch", UNSLOTH["lookahead"], "target_modules")], names)
    assert [name for name, hit in zip(names, hits, strict=True) if hit is not None] == names[:120:2]


def test_a_config_of_2023(base: Base, copy_of: Callable[..., AdapterCopy]) -> None:
    adapter = copy_of("rank4_qv")
    expected = base.reader().read(adapter.folder).manifest
    fields = ("lora_alpha", "r", "target_modules", "peft_type", "task_type", "bias")
    config = json.loads((adapter.folder / CONFIG).read_text())
    old = {name: config[name] for name in fields} | {"enable_lora": None, "merge_weights": False}
    (adapter.folder / CONFIG).write_text(json.dumps(old))
    assert assert_does_as_peft(base, adapter.folder).manifest == expected
    adapter.set_config(enable_lora=[True, False, True])
    with pytest.raises(AdapterRefused) as caught:
        base.reader().read(adapter.folder)
    assert (caught.value.code, caught.value.param) == ("unsupported_field", "enable_lora")


def test_types_of_values(base: Base, copy_of: Callable[..., AdapterCopy]) -> None:
    adapter = copy_of("rank4_qv")

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            tensors[name] = tensor.half() if "lora_A" in name else tensor.bfloat16()

    adapter.change_tensors(change)
    adapter.set_config(lora_alpha=-8.0)
    path = adapter.folder / WEIGHTS
    save_file(load_file(path), path, metadata={"format": "pt", "training": "x" * 200_000})
    assert_does_as_peft(base, adapter.folder)


def test_a_checkpoint_folder_of_a_trainer(base: Base, copy_of: Callable[..., AdapterCopy]) -> None:
    adapter = copy_of("rank4_qv")
    expected = base.reader().read(adapter.folder).manifest
    for name in ("optimizer.pt", "rng_state.pth", "training_args.bin", "trainer_state.json", "adapter_model.bin"):
        (adapter.folder / name).write_bytes(b"not for you")
    (adapter.folder / "global_step500").mkdir()
    assert base.reader().read(adapter.folder).manifest == expected


def test_folders_of_mlx(base: Base, copy_of: Callable[..., AdapterCopy]) -> None:
    adapter = copy_of("rank4_qv")
    fields = {"adapter_path": "adapters", "fine_tune_type": "lora", "lora_parameters": {"rank": 8}, "num_layers": 8}
    (adapter.folder / CONFIG).write_text(json.dumps(fields))
    with pytest.raises(AdapterRefused, match="this is no config of PEFT") as caught:
        base.reader().read(adapter.folder)
    assert caught.value.param == "peft_type"
    (adapter.folder / WEIGHTS).rename(adapter.folder / "adapters.safetensors")
    with pytest.raises(AdapterRefused) as caught:
        base.reader().read(adapter.folder)
    assert caught.value.code == "missing_weights"


def test_an_adapter_of_transformers_itself(base: Base, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(base.folder, dtype=torch.float32)
    torch.manual_seed(1)
    model.add_adapter(LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    randomise_adapter(model, 0.7)
    model.save_pretrained(tmp_path)
    assert_does_as_peft(base, tmp_path)


@pytest.mark.parametrize("kind", ["cat", "svd"])
def test_a_mixture_of_adapters(base: Base, adapter_of: Callable[..., Path], tmp_path: Path, kind: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(base.folder, dtype=torch.float32)
    peft_model = PeftModel.from_pretrained(model, adapter_of("rank4_qv"), adapter_name="one")
    peft_model.load_adapter(adapter_of("rank5_odd"), adapter_name="two")
    rank = {"svd_rank": 5} if kind == "svd" else {}
    peft_model.add_weighted_adapter(["one", "two"], [0.7, 0.4], combination_type=kind, adapter_name="mix", **rank)
    peft_model.save_pretrained(tmp_path, selected_adapters=["mix"])
    assert_does_as_peft(base, tmp_path / "mix")


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"target_modules": ("q_proj", "lm_head")},
        {"target_modules": ("q_proj", "embed_tokens")},
        {"trainable_token_indices": [3, 7, 250]},
        {"modules_to_save": ("embed_tokens",)},
        {"modules_to_save": ("lm_head",)},
        {"save_embedding_layers": True},
    ],
    ids=["lora", "lora-head", "lora-embedding", "tokens", "save-embedding", "save-head", "copies"],
)
@pytest.mark.parametrize("is_copy", [False, True], ids=["own-output", "copied-output"])
def test_a_tied_base_whose_checkpoint_has_an_output(
    base_for: Callable[[BaseKind], Base], tmp_path: Path, options: dict[str, Any], is_copy: bool
) -> None:
    """What a merge leaves: the config says tied, and the weights do not."""
    tied = base_for("llama_tied")
    shutil.copytree(tied.folder, tmp_path / "base")
    path = tmp_path / "base" / "model.safetensors"
    tensors = load_file(path)
    embedding = tensors["model.embed_tokens.weight"]
    head = embedding.clone() if is_copy else embedding.flip(0) * 0.9
    save_file({**tensors, "lm_head.weight": head}, path, metadata={"format": "pt"})
    base = Base(tmp_path / "base", tied.geometry)
    assert_does_as_peft(base, make_adapter(tmp_path / "a", base.folder, "rank4_qv", **options))


def test_buffers_that_follow_from_the_config_are_passed_over(base: Base, copy_of: Callable[..., AdapterCopy]) -> None:
    """DeepSpeed's consolidated files, and those of older models, have the frequencies of every layer."""
    adapter = copy_of("rank4_qv")
    before = base.reader().read(adapter.folder).manifest
    name = "base_model.model.model.layers.0.self_attn.rotary_emb.inv_freq"
    adapter.change_tensors(lambda tensors: tensors.update({name: torch.ones(8)}))
    assert assert_does_as_peft(base, adapter.folder).manifest == before
