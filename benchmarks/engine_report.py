"""Holds the results of `engine.py` against the bars for an engine on an H200, and draws them."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bars import Bar, at_least, at_most, latest, median, print_bars, ratio, read

Results = Mapping[str, list[dict[str, Any]]]
TOKENS_PER_S = "output_tokens_per_s"
MANY = {"zipf_resident": "all resident", "zipf_pool64": "64 fit"}
"""Cases that run at several rates of requests, each in lines of its own."""
FIRST_RATE = 60.0
"""Requests a second of lines that do not say: there was one rate once."""
PEER_RUNS = {"base": ("base", "base2"), "one": ("lora1",), "lora64": ("lora64", "lora64_2")}
"""Case -> what another server's results call its runs."""
PEER_STEPS = {"decode_base": "decode64_base", "decode_lora64": "decode64_lora64"}
"""The same of decode steps."""


def report(path: Path, peers: Sequence[Path], fidelity: Path) -> None:
    """Print the figures and the bars; draw them beside the results. `fidelity`: what `fidelity.py` has written."""
    results = latest(path)
    found = read_peers(peers)
    for case, lines in _split_rates(results).items():
        names = [name for name, value in lines[0].items() if isinstance(value, int | float)]
        figures = ", ".join(f"{name} {value:,.5g}" for name in names if (value := median(lines, name)) is not None)
        print(f"{case}: {figures}")
    print()
    print_bars(engine_bars(results, found, differences(fidelity)))
    _draw(results, found, path.with_suffix(".png"))


def on_gpu(fidelity: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """(Dtype, comparison) -> the last line of it that is of a GPU, of what `fidelity.py` has written."""
    lines = read(fidelity) if fidelity.exists() else []
    return {(line["dtype"], line["comparison"]): line for line in lines if "NVIDIA" in line["device"]}


def differences(fidelity: Path) -> dict[str, float]:
    """Dtype -> largest difference of any logprob from transformers + PEFT, in the last comparisons on a GPU."""
    largest: dict[str, float] = {}
    for (dtype, comparison), line in on_gpu(fidelity).items():
        if comparison != "transformers' own":
            found = (line[phase]["max_of_max"] for phase in ("prefill", "decode"))
            largest[dtype] = max(largest.get(dtype, 0.0), *found)
    return largest


def peer_files() -> list[Path]:
    """Other servers' results of the same work, beside our own."""
    return sorted((Path(__file__).with_name("results") / "peers").glob("*.json"))


def read_peers(files: Sequence[Path]) -> list[dict[str, Any]]:
    """A server's results each."""
    return [json.loads(file.read_text()) for file in files]


def peer_speed(peer: Mapping[str, Any], case: str) -> float | None:
    """Output tokens/s of another server's best run of the case."""
    return max((peer[run]["out_tok_s"] for run in PEER_RUNS.get(case, ()) if run in peer), default=None)


def step_ms(results: Results, case: str) -> float | None:
    """Milliseconds of our decode step, taken as `peer_step_ms` takes another server's."""
    lines = results.get(case)
    return statistics.median(line["seconds"] / line["steps"] * 1e3 for line in lines) if lines else None


def peer_step_ms(peer: Mapping[str, Any], case: str) -> float | None:
    """Milliseconds of another server's decode step: of all of its seconds, that of the prompts included."""
    found = peer.get(PEER_STEPS.get(case, ""), {}).get("ms_per_step")
    return None if found is None else float(found)


def peer_name(peer: Mapping[str, Any]) -> str:
    """With its version, and whether it ran without LoRA."""
    name = " ".join(filter(None, (peer.get("engine"), peer.get("version"))))
    return name if peer.get("lora", True) else f"{name}, LoRA off"


def rates(results: Results) -> list[float]:
    """Requests a second that the cases of `MANY` were run at."""
    return sorted({_rate(line) for case in MANY for line in results.get(case, ())}) or [FIRST_RATE]


def at_rate(results: Results, case: str, rate: float) -> list[dict[str, Any]]:
    """The case's lines of so many requests a second."""
    return [line for line in results.get(case, ()) if _rate(line) == rate]


def _rate(line: Mapping[str, Any]) -> float:
    return float(line.get("per_second", FIRST_RATE))


def _split_rates(results: Results) -> Results:
    """With a case of its own for every rate."""
    split = {f"{case} at {rate:g}/s": at_rate(results, case, rate) for case in MANY for rate in rates(results)}
    others = {case: lines for case, lines in results.items() if case not in MANY}
    return {**others, **{case: lines for case, lines in split.items() if lines}}


def engine_bars(
    results: Results, peers: Sequence[Mapping[str, Any]], logprob_differences: Mapping[str, float]
) -> Iterator[Bar]:
    """`peers`: other servers' results on the same work. `logprob_differences`: as `differences` says."""

    def of(case: str, name: str = TOKENS_PER_S) -> float | None:
        return median(results.get(case), name)

    def best_peer(case: str) -> float | None:
        return max((speed for peer in peers if (speed := peer_speed(peer, case)) is not None), default=None)

    base = of("base")
    yield at_least("base only, of the better peer's", ratio(base, best_peer("base")), 1.0)
    yield at_least("64 adapters, of our own base", ratio(of("lora64"), base), 0.85)
    yield at_least("64 adapters, of the better peer's", ratio(of("lora64"), best_peer("lora64")), 1.3)
    yield at_least("one adapter on all requests, of our own base", ratio(of("one"), base), 0.92)
    yield at_least(
        "LoRA enabled and no adapter used, of LoRA disabled", ratio(of("base_enabled"), of("base_no_lora")), 0.99
    )
    yield at_most("decode step of 64 sequences, base, ms", of("decode_base", "gap_ms_p50"), 5.5)
    yield at_most("decode step of 64 sequences, 64 adapters, ms", of("decode_lora64", "gap_ms_p50"), 7.5)
    for rate in rates(results):
        resident, pool64 = (median(at_rate(results, case, rate), "first_token_ms_p99") for case in MANY)
        name = f"first token p99, pool of 64 of 512 adapters, over all resident, at {rate:g} a second"
        yield at_most(name, ratio(pool64, resident), 5.0)
    yield at_most("cold adapter's first token over a warm one's, ms", of("cold", "over_warm_ms_p50"), 15.0)
    hot = [of("hot", f"{kind}_gap_ms_p99") for kind in ("beside", "alone")]
    yield at_most("hot streams' p99 beside cold adapters, over alone", ratio(*hot), 1.1)
    yield at_most("start to ready, made-up weights, s", of("start", "ready"), 60.0)
    yield at_most("start to ready, weights in page cache, nothing compiled, s", of("start_weights", "ready"), 60.0)
    yield at_most("rehearsal within it, s", of("start_weights", "rehearsal"), 3.0)
    yield at_least("shared prefixes (GSM8K's shape), output tokens/s", of("gsm8k"), 5000.0)
    for dtype in ("bfloat16", "float16"):
        yield at_most(f"largest logprob difference from PEFT's, {dtype}", logprob_differences.get(dtype), 0.1)


def _draw(results: Results, peers: Sequence[Mapping[str, Any]], path: Path) -> None:
    import matplotlib.pyplot as plt  # the machine that measures need not have it

    figure, panels = plt.subplots(2, 2, figsize=(11, 7))
    (throughput, step), (latency, start) = panels
    cases = {
        "base_no_lora": "no LoRA",
        "base": "base",
        "one": "one adapter",
        "lora64": "64 adapters",
        "gsm8k": "shared prefix (7B)",
    }
    throughput.set_title("output tokens/s")
    speeds = {case: median(results.get(case), TOKENS_PER_S) for case in cases}
    _compare(throughput, cases, speeds, "{:,.0f}", peers, peer_speed)
    steps = {"decode_no_lora": "no LoRA", "decode_base": "base", "decode_lora64": "64 adapters"}
    step.set_title("decode step of 64 sequences, prompts included, ms")
    times = {case: step_ms(results, case) for case in steps}
    _compare(step, steps, times, "{:.2f}", peers, peer_step_ms)
    runs = [(rate, case) for rate in rates(results) for case in MANY]
    for place, (rate, case) in enumerate(runs):
        for offset, name in ((-0.2, "first_token_ms_p50"), (0.2, "first_token_ms_p99")):
            value = median(at_rate(results, case, rate), name)
            if value is not None:
                bar = latency.bar(place + offset, value, 0.38, color="0.7" if offset < 0 else "C1")
                latency.bar_label(bar, fmt="{:,.0f}")
    latency.set_xticks(range(len(runs)), [f"{MANY[case]},\n{rate:g} a second" for rate, case in runs])
    latency.set_title("512 adapters: first token p50 and p99, ms")
    for place, case in enumerate(("start", "start_weights")):
        names = ("rehearsal", "load", "compile", "warm up", "capture")
        stages = {stage: median(results.get(case), stage) or 0.0 for stage in names}
        stages["other"] = (median(results.get(case), "ready") or 0.0) - sum(stages.values())
        bottom = 0.0
        for color, (stage, seconds) in enumerate(stages.items()):
            start.bar(place, seconds, 0.5, bottom, color=f"C{color}", label=stage if place == 0 else None)
            bottom += seconds
    start.set_xticks([0, 1], ["made-up weights", "from the page cache"])
    start.set_title("start to ready, s")
    start.legend(fontsize=8)
    for panel in panels.flat:
        panel.spines[["top", "right"]].set_visible(False)
    line = next(iter(results.values()))[0]
    figure.suptitle(f"{line['geometry']}, {line['gpu']}, torch {line['torch']}", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _compare(
    panel: Any,
    cases: Mapping[str, str],
    ours: Mapping[str, float | None],
    form: str,
    peers: Sequence[Mapping[str, Any]],
    theirs: Callable[[Mapping[str, Any], str], float | None],
) -> None:
    """A bar for each case that we have a figure of, and other servers' figures of the same cases on them."""
    bars = {case: value for case, value in ours.items() if value is not None}
    names = [f"{cases[case]}\n{form.format(value)}" for case, value in bars.items()]
    panel.bar(names, list(bars.values()), color=[f"C{i}" for i in range(len(bars))])
    panel.tick_params(axis="x", labelsize=8)
    for marker, peer in zip("_Dxv^o", peers, strict=False):
        points = [(place, value) for place, case in enumerate(bars) if (value := theirs(peer, case)) is not None]
        places, values = [place for place, _ in points], [value for _, value in points]
        panel.plot(places, values, marker, color="k", label=peer_name(peer))
    if peers:
        panel.set_ylim(top=panel.get_ylim()[1] * 1.2)
        panel.legend(fontsize=8, ncols=len(peers), loc="upper left", frameon=False, handletextpad=0.2, columnspacing=1)
