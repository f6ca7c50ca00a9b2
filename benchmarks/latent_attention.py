"""Attention to latents on a GPU against the bytes it must read and the products it must make.

    python benchmarks/latent_attention.py --out benchmarks/results/latent_attention.jsonl

DeepSeek's widths in bf16, with the heads of V2-Lite and of V3, CUDA-graph replays. Floors use ceilings measured in the
same run. Every case is checked against float64 before it is timed. Writes a line of JSON a case.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from attention import Case, ceilings, time_us, versions

from lorafleet.kernels.latent import LatentWorkspace, decode, extend

RANK, ROTATED, PAGE_TOKENS = 512, 64, 16
DTYPE = torch.bfloat16
SCALING = 192**-0.5
TOLERANCE = 1.2e-2
ROWS_CHECKED = 16


def cases() -> list[Case]:
    """Decodes of even and uneven lengths, whole prompts, and a chunk of a long one."""
    even = [
        Case(f"decode_{num}x{length}", (1,) * num, (length,) * num)
        for num in (1, 16, 64, 256)
        for length in (128, 2048, 16384)
    ]
    prefill = [
        Case(f"prefill_{num}x{length}", (length,) * num, (length,) * num)
        for num, length in ((4, 512), (1, 2048), (1, 8192))
    ]
    uneven = Case("decode_64_uneven", (1,) * 64, (16384, *(512 + 16 * i for i in range(63))))
    return [*even, uneven, *prefill, Case("extend_2048_of_16384", (2048,), (16384,))]


class Inputs:
    """One case's tensors, pages shuffled."""

    def __init__(self, case: Case, num_heads: int) -> None:
        device, rows = torch.device("cuda"), sum(case.rows)
        num_pages = [-(-length // PAGE_TOKENS) for length in case.lengths]
        self.case = case
        self.keys = torch.randn((sum(num_pages), 1, PAGE_TOKENS, RANK + ROTATED), dtype=DTYPE, device=device)
        self.query, self.turned = (
            torch.randn((num_heads, rows, width), dtype=DTYPE, device=device).transpose(0, 1)
            for width in (RANK, ROTATED)
        )
        self.out = torch.full_like(self.query, float("nan"))
        tables = torch.zeros((len(case.rows), max(num_pages)), dtype=torch.int32)
        for table, pages in zip(tables, torch.randperm(sum(num_pages)).split(num_pages), strict=True):
            table[: len(pages)] = pages
        self.tables = tables.to(device)
        self.lengths = torch.tensor(case.lengths, dtype=torch.int32, device=device)
        self.indptr = torch.tensor((0, *case.rows), dtype=torch.int32).cumsum(0, dtype=torch.int32).to(device)
        self.workspace = LatentWorkspace.allocate(num_heads=num_heads, rank=RANK, device=device)

    def run(self) -> None:
        """The launches under test."""
        where = self.query, self.turned, self.keys, self.tables, self.lengths
        if self.case.is_decode:
            decode(*where, self.out, self.workspace, scaling=SCALING)
        else:
            extend(*where, self.indptr, self.out, scaling=SCALING)

    def check(self) -> float:
        """Relative error of the last rows of the first and last sequence; raises when it is too large."""
        errors, case = [], self.case
        for sequence in (0, len(case.rows) - 1):
            rows, length = min(case.rows[sequence], ROWS_CHECKED), case.lengths[sequence]
            end = sum(case.rows[: sequence + 1])
            pages = self.tables[sequence, : -(-length // PAGE_TOKENS)].long()
            tokens = self.keys[pages, 0].flatten(0, 1)[:length].double()
            query = torch.cat((self.query, self.turned), dim=-1)[end - rows : end].double()
            places = torch.arange(length, device="cuda")
            hidden = places > places[length - rows :, None]
            scores = torch.einsum("rhd,td->hrt", query, tokens) * SCALING
            weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
            expected = torch.einsum("hrt,td->rhd", weights, tokens[:, :RANK])
            errors.append(float((self.out[end - rows : end].double() - expected).norm() / expected.norm()))
        if not max(errors) <= TOLERANCE:
            raise SystemExit(f"{case.name} is wrong: relative errors {errors}, more than {TOLERANCE}")
        return max(errors)


def floors(case: Case, num_heads: int) -> tuple[int, int]:
    """(bytes, FLOP): latents read once, queries read and results written once; two products for each pair."""
    num_bytes = 2 * ((RANK + ROTATED) * sum(case.lengths) + (2 * RANK + ROTATED) * num_heads * sum(case.rows))
    pairs = sum(n * length - n * (n - 1) // 2 for n, length in zip(case.rows, case.lengths, strict=True))
    return num_bytes, 2 * (2 * RANK + ROTATED) * num_heads * pairs


def main() -> None:
    """Run all cases."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True, help="file for the JSON lines")
    parser.add_argument("--cases", default="", help="only cases whose names contain this")
    options = parser.parse_args()
    torch.manual_seed(0)
    bytes_s, flops_s = ceilings()
    print(f"copy {bytes_s / 1e12:.2f} TB/s, bf16 product {flops_s / 1e12:.0f} TFLOP/s")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with options.out.open("w") as file:
        for num_heads in (16, 128):
            for case in cases():
                name = f"{num_heads}_heads_{case.name}"
                if options.cases not in name:
                    continue
                inputs = Inputs(case, num_heads)
                inputs.run()
                error = inputs.check()
                p50 = time_us(inputs.run)[1]
                num_bytes, num_flops = floors(case, num_heads)
                floor_us = max(num_bytes / bytes_s, num_flops / flops_s) * 1e6
                result = {"case": name, "p50_us": round(p50, 2), "floor_us": round(floor_us, 2), "error": error}
                file.write(json.dumps({**result, "bytes": num_bytes, "flops": num_flops, **versions()}) + "\n")
                print(f"{name:36} {p50:9.1f} us, {p50 / floor_us:5.2f} floors", flush=True)


if __name__ == "__main__":
    main()
