"""What benchmarks/csgmv.py counts, checks and reports; the timing itself needs a GPU."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def kernels(script: Callable[[str], ModuleType]) -> ModuleType:
    return script("csgmv")


def test_cases_are_of_all_models_and_ranks(kernels: ModuleType) -> None:
    groups = list(kernels.groups())
    assert len(groups) == len(set(groups)) == 36
    assert {g.rank for g in groups if g.model == "llama-3.1-8b"} == {"8", "16", "32", "64", "128", "8-64"}
    assert {g.model for g in groups} == {"llama-3.1-8b", "qwen2.5-0.5b", "llama-3.1-70b-shard", "llama-2-7b"}
    assert set(kernels.rank_sets()["8-64"]) == {8, 16, 32, 64}
    assert {len(rows) for rows in kernels.batches().values()} == {1, 16, 64, 256, 2048, 8192}


def test_floor_counts_each_byte_once(kernels: ModuleType) -> None:
    workload = kernels.Workload(32, (16, 8), (4, 9, 2), (0, 1, 1))
    weights = 2 * (4 + 9) * (2 * 32 + 24)
    assert kernels.floor(workload, 1e6, 1e30) == weights + 2 * 3 * 32 + 2 * 2 * 3 * 24
    assert kernels.floor(workload, 1e30, 1e6) == pytest.approx(2 * (4 + 9 + 9) * (2 * 32 + 24))


def test_a_wrong_result_is_seen(kernels: ModuleType) -> None:
    workload = kernels.Workload(32, (16, 24), (4, 9, 2), (0, 1, 1, 2, 0))
    (weights,) = kernels.random_weights(workload, CPU, num_sets=1)
    x = torch.randn(5, 32, dtype=torch.bfloat16)
    y = torch.full((5, 40), float("nan"), dtype=torch.bfloat16)
    assert not kernels.error(workload, weights, x, y) < kernels.TOLERANCE
    kernels.ours(workload, [weights], x, y, accumulate=False)(0)
    assert kernels.error(workload, weights, x, y) < kernels.TOLERANCE
    y[3] = y[0]
    assert kernels.error(workload, weights, x, y) > 0.1


def row(rank: str, batch: str, floor_us: float, module: str = "o", **medians: float) -> dict[str, object]:
    common = {"gpu": "none", "torch": "2", "triton": "3", "model": "llama-3.1-8b", "module": module}
    times = {f"{name}_us": [us, us, us] for name, us in medians.items()}
    return {**common, "rank": rank, "batch": batch, "rows": 1, "adapters": 1, "floor_us": floor_us, **times}


@pytest.mark.slow
def test_report_holds_the_cases_against_the_bars(
    script: Callable[[str], ModuleType], kernels: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = script("kernels_report")
    rows = [
        row("64", "decode_1", 0.5, ours=99.0),  # measured again below
        row("64", "decode_64_same", 20.0, ours=30.0, sglang16=120.0, sglang128=90.0, vllm=29.0),
        row("8-64", "decode_64_same", 10.0, ours=12.0, sglang16=48.0),
        row("64", "decode_1", 0.5, ours=5.0, sglang16=25.0, vllm=8.0),
        row("16", "decode_1", 0.5, module="embedding", ours=3.0, gather=2.0),
        {**row("16", "decode_1", 0.5), "ours_failure": "out of resource"},
    ]
    path = tmp_path / "kernels.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in rows))
    kernels.main(["--out", str(path), "--report"])
    said = capsys.readouterr().out
    assert "ours_failure of llama-3.1-8b rank 16 o decode_1: out of resource" in said
    assert "slower than the better peer: llama-3.1-8b rank 64 o decode_64_same 30.0, 29.0" in said
    assert path.with_suffix(".png").stat().st_size > 10_000
    values = {bar.name.split(",")[0]: (bar.value, bar.verdict) for bar in report.kernel_bars(report.read_rows(path))}
    assert values["cases that failed or were wrong"] == (1, "misses")
    assert values["times the floor"] == (pytest.approx((1.5 * 1.2) ** 0.5), "holds")
    assert values["times faster than SGLang's best chunk"] == (pytest.approx((3 * 4 * 5) ** (1 / 3)), "holds")
    assert values["times faster than the better of both peers"][1] == "misses"
    assert values["cases slower than the better peer"] == (1, "misses")
    assert values["us where the floor is under 1 us"] == (5.0, "holds")
    assert values["mixed ranks over their own floor"] == (pytest.approx(0.8), "holds")
    assert values["embedding"] == (1.5, "misses")
