"""Biases, tokens and whole modules that PEFT trained: how they lie in memory, what identifies them, what is refused."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, PhiConfig

from lorafleet.adapter_store.base_weights import CheckpointWeights
from lorafleet.adapter_store.errors import AdapterRefused, StoreUnusable
from lorafleet.adapter_store.folder_layout import manifest_of, read_manifest_row
from lorafleet.adapter_store.manifest import NUMPY_DTYPES, AdapterManifest, Dtype, ExtraManifest
from lorafleet.adapter_store.names import NameRecord
from lorafleet.adapter_store.peft_format import AdapterReader
from lorafleet.adapter_store.service import AdapterStore
from tests.adapter_store.conftest import AdapterCopy, Base, geometry_of
from tests.adapter_store.test_fields import assert_does_as_peft
from tests.support.adapters import randomise_adapter
from tests.support.bases import BaseKind
from tests.support.fields import SERVED

TORCH_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
PREFIX = "base_model.model."
LAYER = f"{PREFIX}model.layers.0.self_attn"


@pytest.fixture(scope="module")
def made(
    base_for: Callable[[BaseKind], Base], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[Base, Path]]:
    """`made("tokens")`: the base and the folder of an adapter of `SERVED`; not to be changed."""
    found: dict[str, tuple[Base, Path]] = {}

    def of(name: str) -> tuple[Base, Path]:
        if name not in found:
            base = base_for(SERVED[name].base)
            found[name] = base, SERVED[name].make(tmp_path_factory.mktemp("made") / name, base.folder)
        return found[name]

    return of


@pytest.fixture
def copied(made: Callable[[str], tuple[Base, Path]], tmp_path: Path) -> Callable[[str], tuple[Base, AdapterCopy]]:
    """As `made`, to be changed."""

    def of(name: str) -> tuple[Base, AdapterCopy]:
        base, folder = made(name)
        shutil.copytree(folder, tmp_path / "copied" / name)
        return base, AdapterCopy(tmp_path / "copied" / name)

    return of


def read(base: Base, folder: Path) -> AdapterManifest:
    return base.reader().read(folder).manifest


def own_tensors(base: Base) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = AutoModelForCausalLM.from_pretrained(
        base.folder, dtype=torch.float32
    ).state_dict()
    return tensors


@pytest.mark.parametrize("served", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_each_value_is_rounded_once(
    copied: Callable[[str], tuple[Base, AdapterCopy]], stored: torch.dtype, served: Dtype
) -> None:
    base, adapter = copied("everything")
    adapter.change_tensors(lambda tensors: tensors.update({name: t.to(stored) for name, t in tensors.items()}))
    geometry = type(base.geometry)(base.geometry.modules, served, base.geometry.vectors, base.geometry.tied)
    weights = AdapterReader(geometry, 64, CheckpointWeights(base.folder)).read(adapter.folder)
    tensors = {
        name.removeprefix(PREFIX): tensor.double()
        for name, tensor in load_file(adapter.folder / "adapter_model.safetensors").items()
    }
    own = own_tensors(base)

    def rounded(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
        narrow = tensor.to(TORCH_DTYPES[served])
        return narrow.view(torch.uint16).numpy() if served == "bfloat16" else narrow.numpy()

    assert list(weights.extras) == [extra.name for extra in weights.manifest.extras]
    assert list(weights.tensors) == [module.name for module in weights.manifest.modules]
    scalings = {module.name: module.scaling for module in weights.manifest.modules}
    for extra in weights.manifest.extras:
        array = weights.extras[extra.name]
        assert array.shape == (extra.num_rows, extra.width)
        assert array.dtype == NUMPY_DTYPES[served]
        assert array.flags.c_contiguous
        assert not array.flags.writeable
        if extra.kind == "replaced":
            expected = tensors[extra.name].reshape(array.shape)
        else:
            trained = [f"{extra.name}.base_layer.bias", f"{extra.name}.bias"]
            difference = [tensors[name] - own[f"{extra.name}.bias"].double() for name in trained if name in tensors]
            expected = sum(difference, scalings[extra.name] * tensors[f"{extra.name}.lora_B.bias"]).reshape(1, -1)
        np.testing.assert_array_equal(array, rounded(expected))
    rows = tensors["model.embed_tokens.token_adapter.trainable_tokens_delta"]
    difference = rows - own["model.embed_tokens.weight"][[3, 7, 250]].double()
    picks = torch.zeros(3, 304)
    picks[torch.arange(3), torch.tensor([3, 7, 250])] = 1
    a, b = weights.tensors["model.embed_tokens"]
    np.testing.assert_array_equal(a, rounded(picks.T))
    np.testing.assert_array_equal(b, rounded(difference))
    a, b = weights.tensors["lm_head"]
    np.testing.assert_array_equal(a[4:], rounded(difference / scalings["lm_head"]))
    np.testing.assert_array_equal(b[4:], rounded(picks))
    np.testing.assert_array_equal(a[:4], rounded(tensors["lm_head.lora_A.weight"]))
    for array in (*weights.tensors["lm_head"], *weights.tensors["model.embed_tokens"]):
        assert array.flags.c_contiguous
        assert not array.flags.writeable


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("bias-lora", "q_proj.base_layer.bias"),
        ("bias-all", "k_proj.bias"),
        ("bias-all-norms", "ln_1.bias"),
        ("lora-bias", "v_proj.lora_B.bias"),
        ("save-embedding", "embed_tokens.weight"),
        ("save-head-tied", "lm_head.weight"),
        ("save-norms", "1.self_attn.q_norm.weight"),
        ("tokens", "trainable_tokens_delta"),
        ("tokens-that-differ-tied", "lm_head.token_adapter.trainable_tokens_delta"),
    ],
)
def test_version_covers_every_value(copied: Callable[[str], tuple[Base, AdapterCopy]], name: str, part: str) -> None:
    base, adapter = copied(name)
    before = read(base, adapter.folder)

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensor = next(tensor for key, tensor in tensors.items() if key.endswith(part))
        tensor.view(-1)[-1] += 1e-3

    adapter.change_tensors(change)
    after = read(base, adapter.folder)
    assert (after.modules, after.extras, after.num_bytes) == (before.modules, before.extras, before.num_bytes)
    assert after.version != before.version


def test_version_covers_tokens_and_the_base(copied: Callable[[str], tuple[Base, AdapterCopy]], tmp_path: Path) -> None:
    base, adapter = copied("tokens")
    before = read(base, adapter.folder)
    model = AutoModelForCausalLM.from_pretrained(base.folder)
    with torch.no_grad():
        model.get_input_embeddings().weight[7, 7] += 1
    model.save_pretrained(tmp_path / "other")
    other = AdapterReader(base.geometry, 64, CheckpointWeights(tmp_path / "other")).read(adapter.folder).manifest
    adapter.set_config(trainable_token_indices=[3, 8, 250])
    assert len({before.version, other.version, read(base, adapter.folder).version}) == 3


def test_biases_as_the_base_has_them_are_none(
    made: Callable[[str], tuple[Base, Path]], copied: Callable[[str], tuple[Base, AdapterCopy]]
) -> None:
    base, adapter = copied("bias-all")
    own = own_tensors(base)

    def untrain(tensors: dict[str, torch.Tensor]) -> None:
        for name in tensors:
            if name.endswith(".bias"):
                tensors[name] = own[name.removeprefix(PREFIX).replace(".base_layer", "")].clone()

    adapter.change_tensors(untrain)
    with_bias = read(base, adapter.folder)
    assert with_bias.extras == ()
    adapter.change_tensors(lambda tensors: [tensors.pop(name) for name in list(tensors) if "bias" in name])
    adapter.set_config(bias="none")
    assert read(base, adapter.folder) == with_bias


@pytest.mark.parametrize("name", ["everything", "save-both-tied", "bias-all-saved-norm"])
def test_names_without_the_prefix_are_the_same_adapter(
    copied: Callable[[str], tuple[Base, AdapterCopy]], name: str
) -> None:
    base, adapter = copied(name)
    before = read(base, adapter.folder)

    def strip(tensors: dict[str, torch.Tensor]) -> None:
        for key in list(tensors):
            tensors[key.removeprefix(PREFIX)] = tensors.pop(key)

    adapter.change_tensors(strip)
    assert read(base, adapter.folder) == before
    base.reader().drop_base_copies(adapter.folder)
    assert read(base, adapter.folder) == before


def test_transformers_reads_names_without_the_prefix_as_we_do(
    base: Base, adapter_of: Callable[..., Path], tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(base.folder, dtype=torch.float32)
    model.load_adapter(str(adapter_of("rank16")))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(tmp_path, save_peft_format=False)
    assert not any(name.startswith(PREFIX) for name in load_file(tmp_path / "adapter_model.safetensors"))
    assert read(base, tmp_path).version == read(base, adapter_of("rank16")).version


async def test_shards_that_transformers_writes_are_refused(
    base: Base, adapter_of: Callable[..., Path], store: AdapterStore, tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(base.folder, dtype=torch.float32)
    model.load_adapter(str(adapter_of("rank16")))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(tmp_path / "adapters" / "a", max_shard_size="20KB")
    assert len(list((tmp_path / "adapters" / "a").glob("adapter_model-*.safetensors"))) > 1
    with pytest.raises(AdapterRefused) as caught:
        await store.publish("disk", "a")
    assert caught.value.code == "sharded_weights"


Change = Callable[[dict[str, torch.Tensor]], object]
BROKEN: dict[str, tuple[str, str, str, Change]] = {
    # id: adapter, code, the tensor or field at fault, what is done to its tensors
    "mixed-prefixes": (
        "rank1",
        "unmatched_tensor",
        f"{LAYER}.q_proj.lora_A.weight".removeprefix(PREFIX),
        lambda t: t.update(
            {f"{LAYER}.q_proj.lora_A.weight".removeprefix(PREFIX): t.pop(f"{LAYER}.q_proj.lora_A.weight")}
        ),
    ),
    "no-lora-bias": (
        "lora-bias",
        "missing_tensor",
        f"{LAYER}.q_proj.lora_B.bias",
        lambda t: t.pop(f"{LAYER}.q_proj.lora_B.bias"),
    ),
    "no-head": ("save-head", "missing_tensor", f"{PREFIX}lm_head.weight", lambda t: t.pop(f"{PREFIX}lm_head.weight")),
    "no-norm-bias": (
        "save-norms-with-bias",
        "missing_tensor",
        f"{PREFIX}transformer.ln_f.bias",
        lambda t: t.pop(f"{PREFIX}transformer.ln_f.bias"),
    ),
    "no-rows": (
        "tokens",
        "missing_tensor",
        f"{PREFIX}model.embed_tokens.token_adapter.trainable_tokens_delta",
        lambda t: t.pop(f"{PREFIX}model.embed_tokens.token_adapter.trainable_tokens_delta"),
    ),
    "fewer-rows": (
        "tokens",
        "wrong_shape",
        f"{PREFIX}model.embed_tokens.token_adapter.trainable_tokens_delta",
        lambda t: t.update({f"{PREFIX}model.embed_tokens.token_adapter.trainable_tokens_delta": torch.zeros(2, 64)}),
    ),
    "rows-of-a-tied-head": (
        "tokens-tied",
        "unmatched_tensor",
        f"{PREFIX}lm_head.token_adapter.trainable_tokens_delta",
        lambda t: t.update({f"{PREFIX}lm_head.token_adapter.trainable_tokens_delta": torch.zeros(3, 64)}),
    ),
    "narrow-norm": (
        "save-one-norm",
        "wrong_shape",
        f"{PREFIX}model.norm.weight",
        lambda t: t.update({f"{PREFIX}model.norm.weight": torch.zeros(63)}),
    ),
    "bias-of-integers": (
        "bias-lora",
        "unsupported_dtype",
        f"{LAYER}.q_proj.base_layer.bias",
        lambda t: t.update({f"{LAYER}.q_proj.base_layer.bias": torch.zeros(64, dtype=torch.int32)}),
    ),
    "nan-bias": (
        "bias-all",
        "non_finite",
        f"{LAYER}.k_proj.bias",
        lambda t: t[f"{LAYER}.k_proj.bias"].fill_(float("nan")),
    ),
    "nan-lora-bias": (
        "lora-bias",
        "non_finite",
        f"{LAYER}.v_proj.lora_B.bias",
        lambda t: t[f"{LAYER}.v_proj.lora_B.bias"].fill_(float("inf")),
    ),
    "nan-head": (
        "save-head",
        "non_finite",
        f"{PREFIX}lm_head.weight",
        lambda t: t[f"{PREFIX}lm_head.weight"][300].fill_(float("nan")),
    ),
    "nan-rows": (
        "tokens",
        "non_finite",
        f"{PREFIX}model.embed_tokens.token_adapter.trainable_tokens_delta",
        lambda t: t[f"{PREFIX}model.embed_tokens.token_adapter.trainable_tokens_delta"].fill_(float("nan")),
    ),
    "large-rows": (
        "tokens-lora-head-tied",
        "overflow",
        f"{PREFIX}model.embed_tokens.token_adapter.trainable_tokens_delta",
        lambda t: t.update(
            {
                f"{PREFIX}model.embed_tokens.token_adapter.trainable_tokens_delta": torch.full(
                    (3, 64), 3e38, dtype=torch.float64
                )
            }
        ),
    ),
    "bias-where-the-base-has-none": (
        "lora-bias",
        "base_weights_unverified",
        f"{LAYER}.q_proj.base_layer.bias",
        lambda t: t.update({f"{LAYER}.q_proj.base_layer.bias": torch.ones(64)}),
    ),
    "bias-of-a-module-without-lora": (
        "bias-lora",
        "base_weights_changed",
        f"{LAYER}.k_proj.bias",
        lambda t: t.update({f"{LAYER}.k_proj.bias": torch.ones(32)}),
    ),
    "norm-that-was-not-to-be-saved": (
        "save-head",
        "base_weights_changed",
        f"{PREFIX}model.norm.weight",
        lambda t: t.update({f"{PREFIX}model.norm.weight": torch.ones(64)}),
    ),
}


@pytest.mark.parametrize(("name", "code", "param", "change"), BROKEN.values(), ids=BROKEN.keys())
def test_broken(
    copied: Callable[[str], tuple[Base, AdapterCopy]], name: str, code: str, param: str, change: Change
) -> None:
    base, adapter = copied(name)
    adapter.change_tensors(lambda tensors: [change(tensors)].clear())
    with pytest.raises(AdapterRefused) as caught:
        read(base, adapter.folder)
    assert (caught.value.code, caught.value.param) == (code, param)


def test_trained_bias_that_the_config_denies_is_refused(copied: Callable[[str], tuple[Base, AdapterCopy]]) -> None:
    base, adapter = copied("bias-lora")
    adapter.set_config(bias="none")
    with pytest.raises(AdapterRefused) as caught:
        read(base, adapter.folder)
    assert caught.value.code == "base_weights_changed"


def test_lora_of_no_effect_beside_tokens_is_refused(copied: Callable[[str], tuple[Base, AdapterCopy]]) -> None:
    base, adapter = copied("tokens-lora-head-tied")
    adapter.set_config(lora_alpha=0)
    with pytest.raises(AdapterRefused) as caught:
        read(base, adapter.folder)
    assert (caught.value.code, caught.value.param) == ("unsupported_field", "lora_alpha")


@pytest.fixture(scope="module")
def phi(tmp_path_factory: pytest.TempPathFactory) -> Base:
    """A base whose output has a bias."""
    folder = tmp_path_factory.mktemp("phi")
    config = PhiConfig(vocab_size=304, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            parameter.data.copy_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(folder)
    with torch.device("meta"):
        return Base(folder, geometry_of(AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))))


def make_phi(phi: Base, folder: Path, **options: Any) -> Path:
    model = AutoModelForCausalLM.from_pretrained(phi.folder, dtype=torch.float32)
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        torch.manual_seed(1)
        peft_model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"], **options))
        randomise_adapter(peft_model, 0.7)
        peft_model.save_pretrained(folder)
    return folder


def test_output_with_a_bias_is_replaced_with_it(phi: Base, tmp_path: Path) -> None:
    weights = assert_does_as_peft(phi, make_phi(phi, tmp_path, modules_to_save=["lm_head"]))
    assert weights.manifest.extras == (
        ExtraManifest("lm_head", "added", 1, 304),
        ExtraManifest("lm_head.weight", "replaced", 304, 64),
    )


def test_tokens_of_an_output_with_a_bias_are_refused(phi: Base, tmp_path: Path) -> None:
    folder = make_phi(phi, tmp_path, trainable_token_indices={"lm_head": [3, 7]})
    with pytest.raises(AdapterRefused) as caught:
        phi.reader().read(folder)
    assert (caught.value.code, caught.value.param) == ("unsupported_field", "trainable_token_indices")


async def test_store_keeps_extras(
    open_store: Callable[..., AdapterStore],
    made: Callable[[str], tuple[Base, Path]],
    tmp_path: Path,
) -> None:
    base, folder = made("save-embedding-lora-head")
    shutil.copytree(folder, tmp_path / "adapters" / "a")
    options = {"geometry": base.geometry, "base_weights": CheckpointWeights(base.folder)}
    store = open_store(**options)
    manifest = await store.publish("disk", "a")
    await store.flip(NameRecord("a", manifest.version, "disk", "a", False, 0, "admin"))
    assert manifest.extras == (ExtraManifest("model.embed_tokens.weight", "replaced", 304, 64),)
    assert store.usage.cached_bytes == manifest.num_bytes > 304 * 64 * 4
    kept = load_file(next((tmp_path / "state").glob("*/versions/*/*.safetensors")))
    assert any("base_layer" in name for name in load_file(folder / "adapter_model.safetensors"))
    assert not any("base_layer" in name for name in kept)
    half = type(base.geometry)(base.geometry.modules, "float16", base.geometry.vectors, base.geometry.tied)
    store = open_store(**{**options, "geometry": half})
    (named,) = (await store.table()).adapters
    assert (named.manifest.version, named.manifest.extras) == (manifest.version, manifest.extras)
    assert named.manifest.num_bytes == manifest.num_bytes // 2
    weights = await store.fetch(manifest.version)
    assert weights.extras["model.embed_tokens.weight"].dtype == np.float16
    assert weights.manifest == named.manifest


async def test_base_that_is_gone_does_no_damage(
    open_store: Callable[..., AdapterStore], made: Callable[[str], tuple[Base, Path]], tmp_path: Path
) -> None:
    base, folder = made("tokens")
    shutil.copytree(folder, tmp_path / "adapters" / "a")
    manifest = await open_store().publish("disk", "a")
    store = open_store(base_weights=None)
    with pytest.raises(AdapterRefused) as caught:
        await store.fetch(manifest.version)
    assert caught.value.code == "base_weights_unverified"
    weights = await open_store().fetch(manifest.version)
    assert weights.manifest == manifest
    other = tmp_path / "other"
    shutil.copytree(base.folder, other)
    tensors = load_file(other / "model.safetensors")
    tensors["model.embed_tokens.weight"][7] += 1
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(StoreUnusable):
        await open_store(base_weights=CheckpointWeights(other)).fetch(manifest.version)


async def test_manifests_without_extras_are_those_of_before(
    open_store: Callable[..., AdapterStore], copy_of: Callable[..., AdapterCopy], tmp_path: Path
) -> None:
    copy_of("rank16")
    manifest = await open_store().publish("disk", "a")
    fields = asdict(manifest)
    assert fields.pop("extras") == ()
    assert fields.pop("warnings") == ()
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps({"format": 1, **fields}))
    assert manifest_of(read_manifest_row(path, manifest.version)) == manifest
