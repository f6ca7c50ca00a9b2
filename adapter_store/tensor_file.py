"""A safetensors file, read defensively: every offset is checked before a byte of a tensor is touched.

The format: 8 bytes of header length, a JSON header of {name: {dtype, shape, data_offsets}}, then the tensors' bytes
without holes. Nothing in it can run code; what is left to check is whether it is true to its own header.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeGuard

import numpy as np

from lorafleet.adapter_store.errors import AdapterRefused
from lorafleet.adapter_store.tensors import FLOAT_TAGS, STORED, FloatTag, Tensor

MAX_HEADER_BYTES = 32 * 2**20
"""Room for more than 100,000 tensors; beyond that a header is an attack or an accident."""


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of a file."""

    tag: str
    """Its type in the format's words; `FLOAT_TAGS` are the ones that can be read."""
    shape: tuple[int, ...]
    start: int
    """Offset of the first byte in the file."""
    num_bytes: int


@dataclass(frozen=True, slots=True)
class TensorFile:
    """A checked header and the place of its file. Tensors are read when asked for, each into its own array."""

    path: Path
    entries: Mapping[str, TensorEntry]

    @classmethod
    def open(cls, path: Path) -> TensorFile:
        """Read and check the header. Raises AdapterRefused `broken_safetensors`, `truncated` or `header_too_large`."""
        refuse_other_content(path, "broken_safetensors")
        size = path.stat().st_size
        too_short = AdapterRefused(
            "truncated",
            f"the weights file {f'ends after {size} bytes, within its header' if size else 'is empty'}",
            path.name,
        )
        with path.open("rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
            if size < 8:
                raise too_short
            if header_bytes > MAX_HEADER_BYTES:
                message = f"the weights file declares a header of {header_bytes} bytes (at most {MAX_HEADER_BYTES})"
                raise AdapterRefused("header_too_large", message, path.name)
            if size < 8 + header_bytes:
                raise too_short
            header = _parse_header(file.read(header_bytes), path.name)
        return cls(path, _checked_entries(header, data_start=8 + header_bytes, size=size, file_name=path.name))

    def read(self, name: str, rows: Sequence[int] | None = None) -> Tensor:
        """The tensor `name`, which must be of one of `FLOAT_TAGS`, or these rows of it."""
        entry = self.entries[name]
        tag = FLOAT_TAGS[entry.tag]
        with self.path.open("rb") as file:
            if rows is None:
                file.seek(entry.start)
                array = np.fromfile(file, dtype=STORED[tag], count=math.prod(entry.shape))
                return Tensor(tag, array.reshape(entry.shape))
            assert all(0 <= row < entry.shape[0] for row in rows), (rows, entry.shape)
            width = math.prod(entry.shape[1:])
            array = np.empty((len(rows), width), STORED[tag])
            for position, row in enumerate(rows):
                file.seek(entry.start + row * width * array.itemsize)
                array[position] = np.fromfile(file, dtype=array.dtype, count=width)
        return Tensor(tag, array.reshape(len(rows), *entry.shape[1:]))


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file with these tensors, in the order of their names."""
    header: dict[str, object] = {}
    offset = 0
    for name, tensor in sorted(tensors.items()):
        end = offset + tensor.array.nbytes
        header[name] = {"dtype": tensor.tag, "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for _, tensor in sorted(tensors.items()):
            file.write(np.ascontiguousarray(tensor.array).data)


def refuse_other_content(path: Path, code: str) -> None:
    """Refuse with `code`, by what it is, a file that a download left in the place of another."""
    with path.open("rb") as file:
        whole = file.read(512)
    begin = whole.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    is_config = code == "broken_config"
    what: str | None = None
    if not is_config and (whole[8:9] == b"{" or not whole):
        return
    if begin.startswith((b"version https://git-lfs.github.com/spec/", b"# xet version")):
        what = "a Git LFS pointer and not the file itself: run `git lfs pull` where it is from"
    elif begin.startswith((b"<!doctype html", b"<html", b"<?xml", b"<head", b"<!--")):
        what = "a web page and not the file itself: download the file's raw content"
    elif not begin and is_config:
        what = "empty"
    elif not whole.strip(b"\0"):
        what = "nothing but zeros: it was not written to its end"
    elif not is_config and begin.startswith((b"pk\x03\x04", b"\x80\x02", b"\x1f\x8b", b"gguf")):
        what = "of another format under this name: save it with PEFT's save_pretrained"
    elif _is_text(whole) and not (is_config and begin.startswith((b"{", b"["))):
        what = f"text and not the file itself; it begins with {whole[:60].decode()!r}"
    if what is not None:
        raise AdapterRefused(code, f"{path.name} is {what}", path.name)


def _is_text(data: bytes) -> bool:
    return data.isascii() and all(byte >= 32 or byte in b"\t\r\n" for byte in data)


def _parse_header(text: bytes, file_name: str) -> dict[str, object]:
    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        table = dict(pairs)
        if len(table) != len(pairs):
            raise ValueError("a name appears twice")
        return table

    try:
        header = json.loads(text.decode(), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise AdapterRefused("broken_safetensors", "the weights file's header is not valid JSON", file_name) from error
    if not isinstance(header, dict):
        raise AdapterRefused("broken_safetensors", "the weights file's header is not a JSON object", file_name)
    header.pop("__metadata__", None)
    return header


def _checked_entries(
    header: dict[str, object], *, data_start: int, size: int, file_name: str
) -> dict[str, TensorEntry]:
    entries: dict[str, TensorEntry] = {}
    for name, fields in header.items():
        entries[name] = _entry(name, fields, data_start)
    expected = data_start
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].num_bytes)):
        if entry.start != expected:
            raise AdapterRefused("broken_safetensors", f"tensor {name} overlaps another or leaves a hole", name)
        expected += entry.num_bytes
        if expected > size:
            raise AdapterRefused("truncated", f"the weights file ends within tensor {name}", name)
    if expected != size:
        raise AdapterRefused("broken_safetensors", f"{size - expected} bytes after the last tensor", file_name)
    return entries


_ITEM_BITS: Mapping[str, int] = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32, "F64": 64, "I64": 64, "U64": 64, "C64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip


def _entry(name: str, fields: object, data_start: int) -> TensorEntry:
    def broken(what: str) -> AdapterRefused:
        return AdapterRefused("broken_safetensors", f"tensor {name[:200]}: {what}", name)

    if not isinstance(fields, dict):
        raise broken("its entry is not an object")
    tag, shape, offsets = fields.get("dtype"), fields.get("shape"), fields.get("data_offsets")
    if not isinstance(tag, str) or tag not in _ITEM_BITS:
        raise broken(f"unknown dtype {str(tag)[:40]}")
    if not _is_size_list(shape) or not _is_size_list(offsets) or len(offsets) != 2:
        raise broken("shape and data_offsets must be lists of sizes")
    begin, end = offsets
    if (end - begin) * 8 != math.prod(shape) * _ITEM_BITS[tag]:
        raise broken(f"{end - begin} bytes do not hold shape {shape} of {tag}")
    return TensorEntry(tag, tuple(shape), data_start + begin, end - begin)


def _is_size_list(value: object) -> TypeGuard[list[int]]:
    return (
        isinstance(value, list) and len(value) <= 8 and all(type(item) is int and 0 <= item < 2**48 for item in value)
    )


def tag_of(entry: TensorEntry) -> FloatTag | None:
    """The entry's float type, or None if it is of another kind."""
    return FLOAT_TAGS.get(entry.tag)
