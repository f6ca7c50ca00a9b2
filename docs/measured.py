"""Tables of benchmark results, for `generate.py`. The pages take their figures from benchmarks/results alone."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
RESULTS = BENCHMARKS / "results"
sys.path.insert(0, str(BENCHMARKS))

import engine_report  # noqa: E402 (they lie beside each other, in no package)
import kernels_report  # noqa: E402
from bars import Bar, latest, median, number, read  # noqa: E402
from random_models import GEOMETRIES  # noqa: E402

sys.path.append(str(BENCHMARKS.parent))
from tests.chaos import table as chaos  # noqa: E402

Rows = Iterator[Sequence[str]]

PARTS = {
    "shrink": r"_shrink_kernel",
    "expand": r"_expand_kernel",
    "embedding look-up": r"_lookup_kernel",
    "products of the base, head included": r"nvjet|splitKreduce",
    "attention over pages": r"decode_kernel|extend_kernel|sdpa|qkv_tma_setup",
    "norms with residual, SiLU, rotary with the write to pages": r"_rms_norm|_silu_mul|_gated|_rotate_and_store",
    "sampling, inputs and what torch does beside": r".",
}
"""Part of a step -> pattern of its kernels' names. The first part that matches has the kernel."""
DECODES = 64
MEAN_CONTEXT = 144
"""Of the profiled decodes: prompts of 16 tokens, answers of 256."""

BATCHES = {
    "decode_1": "1 row",
    "decode_16_distinct": "16 rows of 16",
    "decode_64_distinct": "64 of 64",
    "decode_64_same": "64 of 1",
    "decode_256_round": "256 of 64",
    "prefill_2048_x8": "2,048 of 8",
    "prefill_8192_x16": "8,192 of 16",
}
ENGINE_CASES = {
    "base": "base only",
    "one": "one adapter on all requests",
    "lora64": "64 adapters",
    "gsm8k": "shared prefix of 700 tokens, one adapter with embeddings and head (Llama-2-7B)",
}

SERVE_SETUPS = {
    "one worker": {"workers": 1, "gpus": 1, "haproxy": True, "rate": None},
    "two GPUs, a worker each": {"workers": 2, "gpus": 2, "haproxy": True, "rate": None},
    "two workers on one GPU, with CUDA's Multi-Process Service": {"workers": 2, "mps": True},
}
SERVE_WAYS = {"http": "over HTTP", "engines": "in-process", "engine": "one engine alone"}


def bar_rows(bars: Iterable[Bar]) -> Rows:
    for bar in bars:
        if bar.value is not None:
            yield bar.name, number(bar.value), f"at {'most' if bar.is_most else 'least'} {bar.bound:,g}", bar.verdict


def kernel_bars() -> Rows:
    yield from bar_rows(kernels_report.kernel_bars(kernels_report.read_rows(RESULTS / "kernels.jsonl")))


def kernel_head() -> Sequence[str]:
    return "rank, module", *BATCHES.values()


def kernel_rows() -> Rows:
    """Ours, the floor and the better of the peers, for the projections of an 8B Llama."""
    rows = kernels_report.read_rows(RESULTS / "kernels.jsonl")
    found = {(row["rank"], row["module"], row["batch"]): row for row in rows if row["model"] == "llama-3.1-8b"}
    for rank, module in dict.fromkeys(key[:2] for key in found if key[1] != "embedding"):
        cells = (found[rank, module, batch] for batch in BATCHES)
        yield f"{rank} {module}", *(_kernel_cell(row) for row in cells)


def _kernel_cell(row: dict[str, Any]) -> str:
    ours, peer = kernels_report.us(row, "ours"), kernels_report.us(row, *kernels_report.PEERS)
    return f"**{ours:.1f}** / {row['floor_us']:.1f} / {peer:.1f}"


def engine_rows() -> Rows:
    results = latest(RESULTS / "engine.jsonl")
    base = median(results["base"], engine_report.TOKENS_PER_S)
    for case, name in ENGINE_CASES.items():
        speed = median(results[case], engine_report.TOKENS_PER_S)
        assert base is not None
        assert speed is not None
        yield name, number(speed), f"{speed / base:.2f}" if case != "gsm8k" else ""


def engine_bars() -> Rows:
    differences = engine_report.differences(RESULTS / "fidelity.jsonl")
    yield from bar_rows(engine_report.engine_bars(latest(RESULTS / "engine.jsonl"), _peers(), differences))


def _peers() -> list[dict[str, Any]]:
    return engine_report.read_peers(engine_report.peer_files())


def peer_rows() -> Rows:
    """Output tokens/s, ms a decode step and seconds to start, ours and the other servers'."""
    results = latest(RESULTS / "engine.jsonl")
    speeds = [median(results[case], engine_report.TOKENS_PER_S) for case in engine_report.PEER_RUNS]
    steps = [engine_report.step_ms(results, case) for case in engine_report.PEER_STEPS]
    yield "lorafleet", *map(_shown, (*speeds, *steps, median(results["start"], "ready")))
    for peer in _peers():
        speeds = [engine_report.peer_speed(peer, case) for case in engine_report.PEER_RUNS]
        steps = [engine_report.peer_step_ms(peer, case) for case in engine_report.PEER_STEPS]
        yield engine_report.peer_name(peer), *map(_shown, (*speeds, *steps, peer["start_s"]))


def _shown(value: float | None) -> str:
    return "" if value is None else number(value)


def fidelity_rows() -> Rows:
    """The last comparisons on a GPU: dtype, comparison, and the largest and mean differences."""
    for (dtype, comparison), line in engine_report.on_gpu(RESULTS / "fidelity.jsonl").items():
        phases = (
            f"{line[phase]['max_of_max']:.1e}, {line[phase]['mean_of_mean']:.1e}" for phase in ("prefill", "decode")
        )
        yield dtype, comparison, *phases, f"{line['strings_equal']} of {line['strings']}"


def step_rows() -> Rows:
    """Device milliseconds of each part of a decode step: its bytes' floor with 64 adapters, and three profiles."""
    cases = ("decode_base", "decode_lora64-before", "decode_lora64")
    steps = [_step_floors(), *(_profiled(RESULTS / f"profile-{case}.txt") for case in cases)]
    for part in PARTS:
        yield part, *(f"{step[part]:.2f}" if step.get(part) else "" for step in steps)
    yield "together", *(f"{sum(step.values()):.2f}" for step in steps)


def prefill_rows() -> Rows:
    """Device milliseconds of each part of a step of 8,192 rows of 16 prompts, without adapters and with 64."""
    steps = [_profiled(RESULTS / f"profile-prefill_{case}.txt") for case in ("base", "lora64")]
    for part in PARTS:
        yield part, *(f"{step[part]:.1f}" if step[part] >= 0.05 else "" for step in steps)
    yield "together", *(f"{sum(step.values()):.1f}" for step in steps)


def attention_rows() -> Rows:
    """Microseconds of a layer's attention to prompts."""
    for line in read(RESULTS / "attention.jsonl"):
        if line["cudnn_us"] is not None:
            times = [line[name] for name in ("floor_us", "p50_us", "cudnn_us")]
            yield line["case"].replace("_", " "), *(number(time) for time in times), f"{times[1] / times[2]:.2f}"


def long_rows() -> Rows:
    """Speed of long prompts."""
    for case, lines in latest(RESULTS / "long.jsonl").items():
        for line in lines:
            who = "base" if case == "long_base" else "an adapter each"
            speeds = (f"{line[name]:,.0f}" for name in ("prompt_tokens_per_s", "output_tokens_per_s"))
            yield f"{line['prompt']:,.0f} tokens, {who}", *speeds


def _step_floors() -> dict[str, float]:
    """Part -> ms of its bytes at the speed of a copy. Expand's row holds those of shrink too."""
    rows = kernels_report.read_rows(RESULTS / "kernels.jsonl")
    of = {"model": "llama-3.1-8b", "batch": f"decode_{DECODES}_distinct", "rank": "16"}
    lora_us = {row["module"]: row["floor_us"] for row in rows if of.items() <= row.items() and "floor_us" in row}
    base = GEOMETRIES["llama-8b"]
    hidden, mlp, layers = base["hidden_size"], base["intermediate_size"], base["num_hidden_layers"]
    kv = hidden // base["num_attention_heads"] * base["num_key_value_heads"]
    weights = layers * hidden * (2 * hidden + 2 * kv + 3 * mlp) + base["vocab_size"] * hidden
    ms_a_value = 2 / (rows[-1]["copy_tb_s"] * 1e9)
    return {
        "expand": layers * sum(lora_us.values()) / 1e3,
        "products of the base, head included": weights * ms_a_value,
        "attention over pages": layers * 2 * kv * DECODES * MEAN_CONTEXT * ms_a_value,
    }


def _profiled(path: Path) -> dict[str, float]:
    """Part -> ms a step. A step rotates once a layer."""
    calls: dict[str, tuple[float, int]] = {}
    for line in path.read_text().splitlines():
        found = re.match(r"\s*(\S.*?)\s{2,}.*\s([\d.]+)(us|ms|s)\s+[\d.]+%\s+\S+\s+\S+\s+(\d+)$", line)
        if found:
            name, value, unit, count = found.groups()
            calls[name] = (
                calls.get(name, (0.0, 0))[0] + float(value) * {"us": 1e-3, "ms": 1.0, "s": 1e3}[unit],
                int(count),
            )
    num_steps = calls["_rotate_and_store_kernel"][1] / GEOMETRIES["llama-8b"]["num_hidden_layers"]
    parts = dict.fromkeys(PARTS, 0.0)
    for name, (ms, _) in calls.items():
        parts[next(part for part, kernels in PARTS.items() if re.search(kernels, name))] += ms / num_steps
    return parts


def serve_rows() -> Rows:
    """Speed and latency of engines on a GPU, over HTTP through Ray Serve and in-process."""
    for setup, of in SERVE_SETUPS.items():
        results = latest(RESULTS / "serve_gpu.jsonl", **of)
        for way, name in SERVE_WAYS.items():
            for line in results.get(way, ()):
                times = (
                    f"{line[f'{kind}_ms_p50']:,.0f}, {line[f'{kind}_ms_p99']:,.0f}" for kind in ("first_token", "gap")
                )
                yield f"{setup}, {name}", number(line["output_tokens_per_s"]), *times


def group_rows() -> Rows:
    """Decode steps of workers with one GPU and with two, beside their bytes and sums."""
    lines = read(RESULTS / "tensor_parallel.jsonl")
    collectives = [line for line in lines if line["case"] == "collectives"]
    sums = {(line["geometry"], line["rows"]): line["all_reduce_us"] for line in collectives}
    steps: dict[tuple[str, int, str], dict[str, Any]] = {}
    for line in lines:
        if line["case"].startswith("decode_"):
            steps[line["geometry"], line["size"], line["case"]] = line
    for (geometry, size, case), line in steps.items():
        kind, count = re.fullmatch(r"decode_([a-z]+)(\d+)", case).groups()  # type: ignore[union-attr]
        layers = GEOMETRIES[geometry]["num_hidden_layers"]
        sum_us = sums.get((geometry, float(count))) if size > 1 else 0.0
        floor_ms = None if sum_us is None else line["bytes_floor_ms"] + 2 * layers * sum_us / 1e3
        yield (
            f"{geometry}, {size} GPU{'s' * (size > 1)}",
            count,
            "" if kind == "base" else count,
            f"{line['gap_ms_p50']:.2f}",
            f"{line['bytes_floor_ms']:.2f}",
            "" if floor_ms is None else f"{line['gap_ms_p50'] / floor_ms:.2f}",
        )


GEOMETRY_STEPS = {
    "moe_decode_base": "Qwen3-30B-A3B",
    "moe_decode_lora64": "the same, 64 adapters on attention",
    "moe_decode_experts64": "the same, 64 adapters on experts",
    "gemma_decode": "Gemma 3 27B",
    "latent_decode": "DeepSeek V2 Lite",
    "latent_decode_lora64": "the same, 64 adapters on attention",
}
MIXTURE_LOADS = {
    "moe_base": "base",
    "moe_lora64": "64 adapters on attention",
    "moe_experts64": "64 adapters on experts",
}


def geometry_rows() -> Rows:
    """Decode steps of 64 sequences of bases that are not Llama's kind."""
    results = latest(RESULTS / "geometries.jsonl")
    for case, name in GEOMETRY_STEPS.items():
        for line in results.get(case, ()):
            yield name, f"{line['gap_ms_p50']:.1f}", f"{line['floor_ms']:.1f}", f"{line['of_floor']:.2f}"


def mixture_rows() -> Rows:
    """Output tokens/s of a mixture, and the part of the base's."""
    results = latest(RESULTS / "geometries.jsonl")
    for case, name in MIXTURE_LOADS.items():
        for line in results.get(case, ()):
            (base,) = (each for each in results["moe_base"] if each["run"] == line["run"])
            speed = line["output_tokens_per_s"]
            yield name, number(speed), f"{speed / base['output_tokens_per_s']:.2f}"


def prompt_graph_rows() -> Rows:
    """First tokens and speed by the kind of graph for prompts beside decodes, and by its largest batch."""
    lines = read(RESULTS / "engine_tried.jsonl", case="prompt_graphs", work="zipf_resident")
    found = {(line["variant"], line["per_second"]): line for line in lines}
    for variant in dict.fromkeys(variant for variant, _ in found):
        slow, fast = found[variant, 40.0], found[variant, 60.0]
        yield (
            variant,
            f"{slow['first_token_ms_p99']:,.0f}",
            f"{fast['first_token_ms_p99']:,.0f}",
            number(fast["output_tokens_per_s"]),
        )


def hot_rows() -> Rows:
    """Gaps between tokens of hot streams beside loads, by the number of threads that load."""
    for line in latest(RESULTS / "engine_tried.jsonl")["hot_by_threads"]:
        yield line["variant"], f"{line['gap_ms_p99']:.2f}", f"{line['device_step_ms_p99']:.2f}"


def chaos_run() -> str:
    """The conditions of `make chaos`."""
    run = _chaos("run")[-1]["run"]
    damage = _chaos("damage")[-1]
    named = ", ".join(f"{kind}: {count}" for kind, count in sorted(damage["named"].items()))
    return (
        f"All clients asked at all times, on {run['cores']} cores that other work shared, with Ray {run['ray']}. "
        f"A store was started on each of {damage['damage']:,} folders with one damaged byte. Every one started, and "
        f"named what was lost: {named}."
    )


def chaos_rows() -> Rows:
    """Rows of what clients saw of each fault."""
    yield from chaos.rows(_chaos("fault"))


def hostile_rows() -> Rows:
    """Rows of what others felt of hostile clients."""
    yield from chaos.hostile_rows(_chaos("hostile"))


def soak_rows() -> Rows:
    """Rows of how fast processes grew in the last soak."""
    for name, rise in _chaos("soak")[-1]["mb_per_hour"].items():
        yield name.rpartition(" ")[0], f"{rise:.1f}"


def _chaos(kind: str) -> list[dict[str, Any]]:
    return [line for line in read(RESULTS / "chaos.jsonl") if kind in line]
