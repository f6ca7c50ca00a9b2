"""Measures the engine on a GPU: the cost of many adapters against none, in one run.

    python benchmarks/engine.py --out benchmarks/results/engine.jsonl [--cases base,lora64] [--seconds 500]
    python benchmarks/engine.py --out benchmarks/results/engine.jsonl --report

Random weights and random token ids, so nothing is downloaded: 256 requests of 512 prompt and 128 output tokens;
adapters of rank 16 on all seven projections. Cases of other geometries are in `geometry_cases.py`: `--process moe`,
`gemma` or `latent`. Each engine shape has a process of its own. Every case runs after a
warm-up of itself and writes its lines of JSON at once.

`--report` holds the last run against the bars and draws it, with the results of `fidelity.py` on a GPU. It also reads
other servers' results of the same work, a file each in results/peers:

    {"engine": ..., "version": ..., "base": {"out_tok_s": ...}, "lora64": ...}
"""

from __future__ import annotations

import argparse
import logging
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import bars
import engine_cases
import engine_report
import geometry_cases
import torch
import transformers
import triton
from engine_cases import FULL, TINY, Case, Lab
from random_models import GEOMETRIES, TINY_OF
from running_engine import Figures

PROCESSES = engine_cases.PROCESSES | geometry_cases.PROCESSES
CASES = {case.__name__: process for process, (_, cases) in PROCESSES.items() for case in cases}


@dataclass(frozen=True, slots=True)
class Session:
    """Output of a run: the file of its lines, their common fields, and the time limit."""

    out: Path
    meta: dict[str, str | int]
    deadline_s: float
    """On the monotonic clock."""

    def say(self, text: str) -> None:
        """With the seconds that are left."""
        print(f"[{self.deadline_s - time.monotonic():5.0f} s left] {text}", flush=True)

    @property
    def is_over(self) -> bool:
        return time.monotonic() > self.deadline_s

    def keep(self, case: str, figures: Figures) -> None:
        bars.append(self.out, {"case": case, **{k: round(v, 4) for k, v in figures.items()}, **self.meta})
        self.say(f"{case} " + ", ".join(f"{k} {v:,.5g}" for k, v in figures.items()))


def run_cases(
    process: str,
    cases: list[str],
    session: Session,
    *,
    geometry: str | None,
    repeats: int,
    max_batch_tokens: int | None = None,
    profile: Path | None = None,
) -> None:
    """The cases of one process, in this one. A `geometry` of `tiny` makes everything small."""
    of_process, known = PROCESSES[process]
    work = TINY if geometry == "tiny" else FULL
    work = replace(work, max_batch_tokens=max_batch_tokens or work.max_batch_tokens)
    geometry = TINY_OF.get(of_process, "tiny") if geometry == "tiny" else geometry or of_process
    with ExitStack() as stack:
        lab = Lab(work, geometry, repeats, stack)
        for case in known:
            if case.__name__ not in cases:
                continue
            if session.is_over:
                session.say(f"no time is left for {case.__name__}")
                continue
            session.say(f"{case.__name__} begins")
            for name, figures in case(lab):
                session.keep(name, figures)
            if profile is not None:
                _profile(case, lab, profile)


def _profile(case: Case, lab: Lab, folder: Path) -> None:
    """Write the device's time by kernel, a text file a case."""
    folder.mkdir(parents=True, exist_ok=True)
    with torch.profiler.profile() as profiler:
        for _ in case(lab):
            break
    table = profiler.key_averages().table(sort_by="self_cuda_time_total", row_limit=40, max_name_column_width=90)
    lines = [line.rstrip() for line in table.splitlines()]
    (folder / f"profile-{case.__name__}.txt").write_text("\n".join(lines) + "\n")


def main(arguments: list[str] | None = None) -> None:
    """Run the cases, a process for each engine shape, or report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="lines of JSON")
    parser.add_argument("--cases", default=",".join(CASES), help="which, with commas between")
    parser.add_argument("--seconds", type=float, default=3600.0, help="no case begins, and none goes on, after so long")
    parser.add_argument("--geometry", choices=GEOMETRIES, help="of every base; `tiny` makes all else small too")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--max-batch-tokens", type=int, help="of a step, in the place of the cases' own")
    parser.add_argument("--commit", default=bars.commit(), help="what is measured, where git cannot say")
    parser.add_argument("--profile", type=Path, help="a folder: also write where the device's time goes")
    parser.add_argument(
        "--report", action="store_true", help="only hold what `--out` has against the bars, and draw it"
    )
    peers = engine_report.peer_files()
    parser.add_argument("--peers", type=Path, nargs="*", default=peers, help="results of other servers, for the report")
    results = Path(__file__).with_name("results")
    parser.add_argument("--fidelity", type=Path, default=results / "fidelity.jsonl", help="for the report")
    parser.add_argument("--run", default=time.strftime("%Y-%m-%dT%H:%M:%S"), help="the run that the lines are of")
    parser.add_argument("--process", choices=PROCESSES, help="only the cases of this one, and in this process")
    args = parser.parse_args(arguments)
    cases = args.cases.split(",")
    unknown = [case for case in cases if case not in CASES]
    if unknown:
        parser.error(f"there is no case {', '.join(unknown)}; there are {', '.join(CASES)}")
    if args.report:
        engine_report.report(args.out, args.peers, args.fidelity)
        return
    deadline_s = time.monotonic() + args.seconds
    if args.process is None:
        _run_processes(args, cases, deadline_s)
        return
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    meta: dict[str, str | int] = {
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "transformers": transformers.__version__,
        "commit": args.commit,
        "geometry": args.geometry or PROCESSES[args.process][0],
        "run": args.run,
    }
    session = Session(args.out, meta, deadline_s)
    if args.max_batch_tokens:
        meta["max_batch_tokens"] = args.max_batch_tokens
    run_cases(
        args.process,
        cases,
        session,
        geometry=args.geometry,
        repeats=args.repeats,
        max_batch_tokens=args.max_batch_tokens,
        profile=args.profile,
    )


def _run_processes(args: argparse.Namespace, cases: list[str], deadline_s: float) -> None:
    """One after another: what one of them cannot do stops none of the others."""
    session = Session(args.out, {}, deadline_s)
    failed = []
    for process in PROCESSES:
        chosen = [case for case in cases if CASES[case] == process]
        left_s = deadline_s - time.monotonic()
        if not chosen:
            continue
        session.say(f"process {process}: {', '.join(chosen)}")
        command = [sys.executable, str(Path(__file__)), "--process", process, "--cases", ",".join(chosen)]
        command += ["--out", str(args.out), "--run", args.run, "--commit", args.commit]
        command += ["--repeats", str(args.repeats), "--seconds", f"{left_s:.0f}"]
        command += ["--geometry", args.geometry] if args.geometry else []
        command += ["--max-batch-tokens", str(args.max_batch_tokens)] if args.max_batch_tokens else []
        command += ["--profile", str(args.profile)] if args.profile else []
        try:
            code = subprocess.run(command, check=False, timeout=max(1.0, left_s)).returncode
        except subprocess.TimeoutExpired:
            code = -1
        if code:
            failed.append(process)
            session.say(f"process {process} {'ran out of time' if code == -1 else f'failed with {code}'}")
    if failed:
        sys.exit(f"not all is measured: {', '.join(failed)}")


if __name__ == "__main__":
    main()
