"""Every rule, broken: refused with the rule's code and the field or tensor at fault, and nothing is left behind."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lorafleet.adapter_store import patterns
from lorafleet.adapter_store.errors import AdapterRefused
from lorafleet.adapter_store.peft_format import AdapterReader
from lorafleet.adapter_store.service import AdapterStore
from lorafleet.adapter_store.validation import RULES
from tests.adapter_store.conftest import AdapterCopy, Base, staged_files

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
Q_A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
Q_B = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
HEAD = "base_model.model.lm_head.base_layer.weight"

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22e\nsize 123456\n"
PAGE = b"\xef\xbb\xbf\n<!DOCTYPE html>\n<html><body>Not found</body></html>"

Break = Callable[[AdapterCopy], object]


def config(**fields: Any) -> Break:
    return lambda adapter: adapter.set_config(**fields)


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Break:
    return lambda adapter: adapter.change_tensors(change)


def put(name: str, tensor: torch.Tensor) -> Break:
    return tensors(lambda table: table.update({name: tensor}))


def drop(*names: str) -> Break:
    return tensors(lambda table: [table.pop(name) for name in names])


def poke(name: str, value: float) -> Break:
    def change(table: dict[str, torch.Tensor]) -> None:
        table[name][1, 2] = value

    return tensors(change)


def write(name: str, content: bytes) -> Break:
    return lambda adapter: adapter.folder.joinpath(name).write_bytes(content)


def remove(*names: str) -> Break:
    return lambda adapter: [adapter.folder.joinpath(name).unlink() for name in names]


def cut(keep: float) -> Break:
    def change(adapter: AdapterCopy) -> None:
        path = adapter.folder / WEIGHTS
        content = path.read_bytes()
        path.write_bytes(content[: int(len(content) * keep)])

    return change


def header(change: Callable[[dict[str, Any]], object]) -> Break:
    """Rewrite the header of the weights file and leave the tensors' bytes as they are."""

    def apply(adapter: AdapterCopy) -> None:
        path = adapter.folder / WEIGHTS
        content = path.read_bytes()
        (length,) = struct.unpack("<Q", content[:8])
        table = json.loads(content[8 : 8 + length])
        change(table)
        text = json.dumps(table).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])

    return apply


def raw_header(text: bytes) -> Break:
    return write(WEIGHTS, struct.pack("<Q", len(text)) + text)


def pickled(adapter: AdapterCopy) -> None:
    adapter.folder.joinpath(WEIGHTS).rename(adapter.folder / "adapter_model.bin")


CASES: dict[str, tuple[str, str | None, str, Break]] = {
    # id: code, param, adapter kind, what is done to it
    "empty": ("empty_folder", CONFIG, "rank4_qv", remove(CONFIG, WEIGHTS)),
    "no_config": ("missing_config", CONFIG, "rank4_qv", remove(CONFIG)),
    "no_weights": ("missing_weights", WEIGHTS, "rank4_qv", remove(WEIGHTS)),
    "pickle": ("pickle_weights", "adapter_model.bin", "rank4_qv", pickled),
    "config_not_json": ("broken_config", CONFIG, "rank4_qv", write(CONFIG, b'{"peft_type": "LORA",')),
    "config_not_utf8": ("broken_config", CONFIG, "rank4_qv", write(CONFIG, b"\xff\xfe\x00\x80")),
    "config_empty": ("broken_config", CONFIG, "rank4_qv", write(CONFIG, b"")),
    "config_list": ("broken_config", CONFIG, "rank4_qv", write(CONFIG, b"[1, 2]")),
    "config_deep": ("broken_config", CONFIG, "rank4_qv", write(CONFIG, b"[" * 1_000_000)),
    "config_huge": ("config_too_large", "adapter_config.json", "rank4_qv", write(CONFIG, b" " * (2**22 + 1))),
    "not_lora": ("unsupported_field", "peft_type", "rank4_qv", config(peft_type="LOHA")),
    "task": ("unsupported_field", "task_type", "rank4_qv", config(task_type="SEQ_WARP")),
    "unknown_field": ("unsupported_field", "use_warp", "rank4_qv", config(use_warp=True)),
    "unknown_number": ("unsupported_field", "warp_rank", "rank4_qv", config(warp_rank=9)),
    "rank_zero": ("invalid_field", "r", "rank4_qv", config(r=0)),
    "rank_text": ("invalid_field", "r", "rank4_qv", config(r="4")),
    "rank_true": ("invalid_field", "r", "rank4_qv", config(r=True)),
    "alpha_null": ("invalid_field", "lora_alpha", "rank4_qv", config(lora_alpha=None)),
    "alpha_nan": ("invalid_field", "lora_alpha", "rank4_qv", config(lora_alpha=float("nan"))),
    "alpha_beyond_floats": ("invalid_field", "lora_alpha", "rank4_qv", config(lora_alpha=10**400)),
    "rslora_number": ("invalid_field", "use_rslora", "rank4_qv", config(use_rslora=2)),
    "rank_pattern_list": ("invalid_field", "rank_pattern", "rank4_qv", config(rank_pattern=["q_proj"])),
    "rank_pattern_zero": ("invalid_field", "rank_pattern", "rank4_qv", config(rank_pattern={"q_proj": 0})),
    "alpha_pattern_text": ("invalid_field", "alpha_pattern", "rank4_qv", config(alpha_pattern={"q_proj": "1"})),
    "no_targets": ("invalid_field", "target_modules", "rank4_qv", config(target_modules=None)),
    "targets_empty": ("invalid_field", "target_modules", "rank4_qv", config(target_modules=[])),
    "targets_number": ("invalid_field", "target_modules", "rank4_qv", config(target_modules=[1])),
    "layers_text": ("invalid_field", "layers_to_transform", "rank4_qv", config(layers_to_transform="1")),
    "layers_with_regex": (
        "invalid_field",
        "layers_to_transform",
        "rank4_qv",
        config(target_modules=".*q_proj", layers_to_transform=[1]),
    ),
    "unknown_target": ("unknown_target", "target_modules", "rank4_qv", config(target_modules=["v", "w_proj"])),
    "target_that_no_lora_fits": (
        "unknown_target",
        "target_modules",
        "rank4_qv",
        config(target_modules=["q_proj", "v_proj", "input_layernorm"]),
    ),
    "part_of_a_name": ("unknown_target", "target_modules", "rank4_qv", config(target_modules=["proj"])),
    "nothing_matches": ("no_module", "target_modules", "rank4_qv", config(target_modules=".*w_proj")),
    "all_excluded": ("no_module", "target_modules", "rank4_qv", config(exclude_modules=["q_proj", "v_proj"])),
    "no_such_layer": ("no_module", "target_modules", "rank4_qv", config(layers_to_transform=[7])),
    "bad_target_pattern": ("invalid_pattern", "target_modules", "rank4_qv", config(target_modules="(q_proj")),
    "bad_rank_pattern": ("invalid_pattern", "rank_pattern", "rank4_qv", config(rank_pattern={"q_proj)": 4})),
    "deep_pattern": ("invalid_pattern", "target_modules", "rank4_qv", config(target_modules="(" * 9999 + ")" * 9999)),
    "rank_over_limit": ("rank_too_large", "r", "rank4_qv", config(r=65)),
    "pattern_rank_over_limit": ("rank_too_large", "r", "rank4_qv", config(rank_pattern={"v_proj": 1000})),
    "weights_cut_short": ("truncated", None, "rank4_qv", cut(0.9)),
    "weights_cut_in_header": ("truncated", None, "rank4_qv", cut(0.05)),
    "weights_without_tensors": ("missing_tensor", WEIGHTS, "rank4_qv", raw_header(b"{}")),
    "weights_empty": ("truncated", None, "rank4_qv", write(WEIGHTS, b"")),
    "weights_of_text": ("broken_safetensors", None, "rank4_qv", write(WEIGHTS, b"these are no weights")),
    "header_too_large": ("header_too_large", None, "rank4_qv", write(WEIGHTS, struct.pack("<Q", 2**62) + b"{}")),
    "header_not_json": ("broken_safetensors", None, "rank4_qv", raw_header(b"{'a': 1}")),
    "header_list": ("broken_safetensors", None, "rank4_qv", raw_header(b"[]")),
    "header_twice": ("broken_safetensors", None, "rank4_qv", raw_header(b'{"a": 1, "a": 2}')),
    "header_deep": ("broken_safetensors", None, "rank4_qv", raw_header(b'{"a":' * 100_000)),
    "entry_no_object": ("broken_safetensors", Q_A, "rank4_qv", header(lambda t: t.update({Q_A: 3}))),
    "entry_dtype": ("broken_safetensors", Q_A, "rank4_qv", header(lambda t: t[Q_A].update(dtype="F33"))),
    "entry_shape": ("broken_safetensors", Q_A, "rank4_qv", header(lambda t: t[Q_A].update(shape=[4, -64]))),
    "entry_size": ("broken_safetensors", Q_A, "rank4_qv", header(lambda t: t[Q_A].update(shape=[4, 65]))),
    "entry_offsets": ("broken_safetensors", Q_A, "rank4_qv", header(lambda t: t[Q_A].update(data_offsets=[0]))),
    "entry_overlaps": ("broken_safetensors", None, "rank4_qv", header(lambda t: t.update({Q_A: dict(t[Q_B])}))),
    "entry_beyond_end": (
        "broken_safetensors",
        None,
        "rank4_qv",
        header(lambda t: t[Q_A].update(data_offsets=[2**40, 2**40 + 1024])),
    ),
    "bytes_left_over": (
        "broken_safetensors",
        None,
        "rank4_qv",
        lambda adapter: adapter.folder.joinpath(WEIGHTS).open("ab").write(b"more"),
    ),
    "unmatched_tensor": ("unmatched_tensor", "stray", "rank4_qv", put("stray", torch.zeros(2))),
    "unmatched_module": (
        "unmatched_tensor",
        Q_A.replace("layers.0", "layers.9"),
        "rank4_qv",
        put(Q_A.replace("layers.0", "layers.9"), torch.zeros(4, 64)),
    ),
    "not_targeted": ("unmatched_tensor", Q_A, "rank4_qv", config(target_modules=["v_proj"])),
    "dora_tensor": (
        "unmatched_tensor",
        Q_A.replace("lora_A.weight", "lora_magnitude_vector"),
        "rank4_qv",
        put(Q_A.replace("lora_A.weight", "lora_magnitude_vector"), torch.zeros(64)),
    ),
    "bias_on_b": (
        "unmatched_tensor",
        Q_B.replace("weight", "bias"),
        "rank4_qv",
        put(Q_B.replace("weight", "bias"), torch.zeros(64)),
    ),
    "half_a_pair": ("missing_tensor", Q_B, "rank4_qv", drop(Q_B)),
    "other_half": ("missing_tensor", Q_A, "rank4_qv", drop(Q_A)),
    "no_pair": ("missing_tensor", Q_A, "rank4_qv", drop(Q_A, Q_B)),
    "more_targets_than_tensors": (
        "missing_tensor",
        Q_A.replace("q_proj", "k_proj"),
        "rank4_qv",
        config(target_modules=["q_proj", "v_proj", "k_proj"]),
    ),
    "other_rank": ("wrong_shape", Q_A, "rank4_qv", config(r=5)),
    "transposed": ("wrong_shape", Q_B, "rank4_qv", put(Q_B, torch.zeros(4, 64))),
    "vector": ("wrong_shape", Q_A, "rank4_qv", put(Q_A, torch.zeros(4 * 64))),
    "integers": ("unsupported_dtype", Q_A, "rank4_qv", put(Q_A, torch.zeros(4, 64, dtype=torch.int8))),
    "float8": ("unsupported_dtype", Q_A, "rank4_qv", put(Q_A, torch.zeros(4, 64).to(torch.float8_e4m3fn))),
    "nan": ("non_finite", Q_A, "rank4_qv", poke(Q_A, float("nan"))),
    "infinity": ("non_finite", Q_B, "rank4_qv", poke(Q_B, float("-inf"))),
    "nan_in_embedding": (
        "non_finite",
        "base_model.model.model.embed_tokens.lora_embedding_A",
        "embeddings",
        poke("base_model.model.model.embed_tokens.lora_embedding_A", float("nan")),
    ),
    "scaling_beyond_float32": ("overflow", "lora_alpha", "rank4_qv", config(lora_alpha=1e308)),
    "negative_scaling_beyond_float32": ("overflow", "lora_alpha", "rank4_qv", config(lora_alpha=-1e308)),
    "product_beyond_float32": (
        "overflow",
        "lora_alpha",
        "rank4_qv",
        tensors(lambda t: t.update({Q_A: t[Q_A] * 1e20, Q_B: t[Q_B] * 1e20})),
    ),
    "beyond_float32": ("overflow", Q_A, "rank4_qv", put(Q_A, torch.full((4, 64), 1e300, dtype=torch.float64))),
    "base_changed": ("base_weights_changed", HEAD, "embeddings", poke(HEAD, 1.0)),
    "base_resized": ("vocabulary_resized", HEAD, "embeddings", put(HEAD, torch.zeros(305, 64))),
    "base_in_integers": (
        "unsupported_dtype",
        HEAD,
        "embeddings",
        put(HEAD, torch.zeros(304, 64, dtype=torch.int32)),
    ),
    "base_of_inner_module": (
        "base_weights_changed",
        Q_A.replace("lora_A", "base_layer"),
        "rank4_qv",
        put(Q_A.replace("lora_A", "base_layer"), torch.zeros(64, 64)),
    ),
}


@pytest.mark.parametrize(("code", "param", "kind", "break_it"), CASES.values(), ids=CASES.keys())
async def test_refused(
    store: AdapterStore,
    copy_of: Callable[..., AdapterCopy],
    tmp_path: Path,
    code: str,
    param: str | None,
    kind: str,
    break_it: Break,
) -> None:
    break_it(copy_of(kind))
    with pytest.raises(AdapterRefused) as caught:
        await store.publish("disk", "a")
    assert caught.value.code == code
    assert caught.value.param is not None, "the tensor, the field or the file"
    if param is not None:
        assert caught.value.param == param
    assert code in RULES
    assert str(tmp_path) not in str(caught.value)
    assert staged_files(tmp_path) == []
    assert (await store.table()).adapters == ()
    assert not list((tmp_path / "state").glob("*/versions/*"))


CONTENTS: dict[str, tuple[bytes, str]] = {
    "pointer": (POINTER, "a Git LFS pointer"),
    "new_pointer": (b'# xet version 0\nfilesize = 3\nhash = "x"\n', "a Git LFS pointer"),
    "page": (PAGE, "a web page"),
    "comment": (b"<!-- cached -->\n<HTML>", "a web page"),
    "answer": (b"Entry not found", "text and not the file itself; it begins with 'Entry not found'"),
    "zeros": (bytes(4096), "nothing but zeros"),
}
"""What downloads leave in the place of a file -> how it is called."""


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
@pytest.mark.parametrize(("content", "called"), CONTENTS.values(), ids=CONTENTS.keys())
def test_other_content_is_called_by_its_name(
    base: Base, copy_of: Callable[..., AdapterCopy], name: str, content: bytes, called: str
) -> None:
    adapter = copy_of("rank4_qv")
    (adapter.folder / name).write_bytes(content)
    with pytest.raises(AdapterRefused, match=f"{name} is {called}") as caught:
        base.reader().read(adapter.folder)
    assert (caught.value.code, caught.value.param) == (
        "broken_config" if name == CONFIG else "broken_safetensors",
        name,
    )


@pytest.mark.parametrize("begin", [b"PK\x03\x04", b"\x1f\x8b\x08", b"GGUF\x03", b"\x80\x02"])
def test_another_format_is_told(base: Base, copy_of: Callable[..., AdapterCopy], begin: bytes) -> None:
    adapter = copy_of("rank4_qv")
    (adapter.folder / WEIGHTS).write_bytes(begin + bytes(range(256)))
    with pytest.raises(AdapterRefused, match="of another format under this name"):
        base.reader().read(adapter.folder)


@pytest.mark.parametrize("begin", [0x0280, 0x8B1F])
def test_a_header_of_any_length_is_no_other_format(base: Base, copy_of: Callable[..., AdapterCopy], begin: int) -> None:
    """Its length may begin as a pickle or an archive does."""
    adapter = copy_of("rank4_qv")
    path = adapter.folder / WEIGHTS
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    length = begin if begin >= size else begin + 0x10000
    path.write_bytes(length.to_bytes(8, "little") + data[8 : 8 + size] + b" " * (length - size) + data[8 + size :])
    base.reader().read(adapter.folder)


async def test_slow_pattern_is_ended(
    base: Base, copy_of: Callable[..., AdapterCopy], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patterns, "TIME_LIMIT_S", 0.3)
    adapter = copy_of("rank4_qv")
    adapter.set_config(target_modules=r"(([a-z0-9_]|\.)+)+!")
    with pytest.raises(AdapterRefused) as caught:
        base.reader().read(adapter.folder)
    assert (caught.value.code, caught.value.param) == ("pattern_too_slow", "target_modules")


@pytest.mark.slow
async def test_weights_larger_than_any_adapter_are_not_even_copied(
    open_store: Callable[..., AdapterStore], copy_of: Callable[..., AdapterCopy]
) -> None:
    adapter = copy_of("rank4_qv")
    with adapter.folder.joinpath(WEIGHTS).open("r+b") as file:
        file.truncate(2**40)
    with pytest.raises(AdapterRefused) as caught:
        await open_store().publish("disk", "a")
    assert caught.value.code == "weights_too_large"


async def test_value_that_only_the_served_dtype_cannot_hold(base: Base, copy_of: Callable[..., AdapterCopy]) -> None:
    adapter = copy_of("rank4_qv")
    poke(Q_A, 70000.0)(adapter)
    base.reader().read(adapter.folder)
    half = type(base.geometry)(base.geometry.modules, "float16")
    with pytest.raises(AdapterRefused) as caught:
        AdapterReader(half, 64).read(adapter.folder)
    assert (caught.value.code, caught.value.param) == ("overflow", Q_A)


async def test_base_copies_are_refused_when_nothing_is_there_to_compare(
    base: Base, adapter_of: Callable[..., Path]
) -> None:
    with pytest.raises(AdapterRefused) as caught:
        AdapterReader(base.geometry, 64).read(adapter_of("embeddings"))
    assert caught.value.code == "base_weights_unverified"


@pytest.mark.slow
async def test_adapter_of_a_larger_base_is_refused(
    base: Base, open_store: Callable[..., AdapterStore], copy_of: Callable[..., AdapterCopy]
) -> None:
    modules = {name: shape for name, shape in base.geometry.modules.items() if "layers.1." not in name}
    copy_of("rank16")
    with pytest.raises(AdapterRefused) as caught:
        await open_store(geometry=type(base.geometry)(modules, "float32")).publish("disk", "a")
    assert caught.value.code == "unmatched_tensor"
