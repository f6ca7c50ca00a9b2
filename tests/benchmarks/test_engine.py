"""Every case of benchmarks/engine.py, with everything small and on the CPU, and what its report makes of the lines."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

PROCESSES = (
    "main",
    "fp8",
    "small",
    "gsm8k",
    "long",
    "zipf_pool64",
    "zipf_resident",
    "structured",
    "speculation",
    "start_weights",
    "moe",
    "gemma",
    "latent",
)
LINES = {
    "long": {"long_base", "long_lora"},
    "no_lora": {"base_no_lora", "base_enabled"},
    "speculation": {
        f"speculation_{text}_{count}" for text in ("one_token", "four_tokens", "random") for count in (1, 8, 64)
    },
}
"""Lines of cases that are not one of their own name."""


@pytest.fixture(scope="module")
def engine(script: Callable[[str], ModuleType]) -> ModuleType:
    return script("engine")


@pytest.fixture(scope="module")
def results(engine: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The lines of all cases."""
    out = tmp_path_factory.mktemp("benchmark") / "engine.jsonl"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("running_engine.gc.collect", lambda: 0)
        for name in ("TRITON_CACHE_DIR", "HOME"):
            patch.setenv(name, os.environ.get(name, ""))  # put back what it was before: a case sets it
        for process in PROCESSES:
            arguments = ["--out", str(out), "--geometry", "tiny", "--repeats", "1", "--run", "now"]
            engine.main([*arguments, "--process", process])
    return out


@pytest.mark.slow
def test_every_case_leaves_its_lines(engine: ModuleType, results: Path) -> None:
    assert set(PROCESSES) == set(engine.PROCESSES)
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    assert {line["case"] for line in lines} == set().union(*(LINES.get(case, {case}) for case in engine.CASES))
    for line in lines:
        assert {"gpu", "torch", "triton", "transformers", "commit", "geometry", "run"} <= line.keys()
    by_case = {line["case"]: line for line in lines}
    assert by_case["zipf_pool64"]["loads"] > 0 == by_case["zipf_resident"]["loads"]
    assert by_case["zipf_pool64"]["bytes_moved"] > 0
    for case in ("zipf_pool64", "zipf_resident"):
        assert [line["per_second"] for line in lines if line["case"] == case] == [60.0, 40.0]
    assert by_case["structured"]["mixed_tokens_per_s"] > 0 < by_case["structured"]["free_gap_ms_p50"]
    starts = by_case["start_weights"]
    assert starts["ready"] >= starts["rehearsal"] + starts["load"] > starts["rehearsal"] > 0


@pytest.mark.slow
def test_report_holds_every_case_against_its_bar(
    engine: ModuleType, results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    peer = {"engine": "other", "base": {"out_tok_s": 1.0}, "lora64_2": {"out_tok_s": 1e12}}
    (tmp_path / "peer.json").write_text(json.dumps(peer))
    phases = {"prefill": {"max_of_max": 0.02}, "decode": {"max_of_max": 0.03}}
    comparisons = [
        {"comparison": name, "dtype": dtype, "device": device, **phases}
        for name, dtype, device in (
            ("full", "bfloat16", "NVIDIA H200"),
            ("chunked", "float16", "NVIDIA H200"),
            ("full", "float32", "AMD EPYC"),
        )
    ]
    (tmp_path / "fidelity.jsonl").write_text("".join(json.dumps(line) + "\n" for line in comparisons))
    files = ["--peers", str(tmp_path / "peer.json"), "--fidelity", str(tmp_path / "fidelity.jsonl")]
    engine.main(["--out", str(results), "--report", *files])
    said = capsys.readouterr().out
    verdicts = [line.split()[0] for line in said.splitlines() if line.startswith(("holds", "misses", "unseen"))]
    assert len(verdicts) == 17
    assert "unseen" not in verdicts
    assert "holds   base only, of the better peer's" in said
    assert "holds   largest logprob difference from PEFT's, float16" in said
    assert "misses  64 adapters, of the better peer's" in said
    assert results.with_suffix(".png").stat().st_size > 10_000


def test_bars_without_a_measurement(script: Callable[[str], ModuleType], capsys: pytest.CaptureFixture[str]) -> None:
    found = list(script("engine_report").engine_bars({"base": [{"output_tokens_per_s": 5.0}]}, [], {}))
    script("bars").print_bars(found)
    said = capsys.readouterr().out.splitlines()
    assert len(said) == len(found)
    assert all(line.startswith("unseen") for line in said)


def test_every_rate_has_a_bar_of_its_own(
    script: Callable[[str], ModuleType], capsys: pytest.CaptureFixture[str]
) -> None:
    report, bars = script("engine_report"), script("bars")

    def said(results: dict[str, list[dict[str, float]]]) -> list[list[str]]:
        bars.print_bars(report.engine_bars(results, [], {}))
        return [line.split() for line in capsys.readouterr().out.splitlines() if "pool of 64" in line]

    before = {"zipf_pool64": [{"first_token_ms_p99": 600.0}], "zipf_resident": [{"first_token_ms_p99": 100.0}]}
    ((verdict, *_, rate, _, _, value, _, _),) = said(before)
    assert (verdict, rate, value) == ("misses", "60", "6"), "a line that does not say was at 60 a second"
    now = {
        "zipf_pool64": [
            {"first_token_ms_p99": 600.0, "per_second": 60.0},
            {"first_token_ms_p99": 40.0, "per_second": 40.0},
        ],
        "zipf_resident": [
            {"first_token_ms_p99": 150.0, "per_second": 60.0},
            {"first_token_ms_p99": 20.0, "per_second": 40.0},
        ],
    }
    assert [(line[0], line[-6], line[-3]) for line in said(now)] == [("holds", "40", "2"), ("holds", "60", "4")]


def test_only_the_last_run_counts(script: Callable[[str], ModuleType], tmp_path: Path) -> None:
    bars, path = script("bars"), tmp_path / "deep" / "lines.jsonl"
    for case, run, value in (("a", "1", 1), ("b", "1", 2), ("a", "2", 3), ("a", "2", 5), ("c", None, 7)):
        bars.append(path, {"case": case, "value": value, **({"run": run} if run else {})})
    found = bars.latest(path)
    assert {case: bars.median(lines, "value") for case, lines in found.items()} == {"a": 4, "b": 2, "c": 7}
    assert bars.median(found.get("d"), "value") is None


def test_a_process_that_fails_or_is_late_ends_none_but_itself(
    engine: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = []

    def run(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        process = command[command.index("--process") + 1]
        asked.append((process, command[command.index("--cases") + 1]))
        if process == "gsm8k":
            raise subprocess.TimeoutExpired(command, 1.0)
        return subprocess.CompletedProcess(command, int(process == "zipf_pool64"))

    monkeypatch.setattr(engine.bars, "commit", lambda: "abc")
    monkeypatch.setattr(engine.subprocess, "run", run)
    cases = ["--cases", "one,gsm8k,base,zipf_pool64,start_weights"]
    with pytest.raises(SystemExit, match="not all is measured: gsm8k, zipf_pool64"):
        engine.main(["--out", str(tmp_path / "x"), *cases])
    alone = [(case, case) for case in ("gsm8k", "zipf_pool64", "start_weights")]
    assert asked == [("main", "one,base"), *alone]
    said = capsys.readouterr().out
    assert "process gsm8k ran out of time" in said
    assert "process zipf_pool64 failed with 1" in said


def test_no_case_begins_when_time_is_over(
    engine: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    engine.main(["--out", str(tmp_path / "x"), "--geometry", "tiny", "--process", "gsm8k", "--seconds", "-1"])
    assert "no time is left for gsm8k" in capsys.readouterr().out
    assert not (tmp_path / "x").exists()


def test_unknown_cases_are_refused(engine: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        engine.main(["--out", str(tmp_path / "x"), "--cases", "base,bass"])
    assert "there is no case bass; there are start, base" in capsys.readouterr().err
