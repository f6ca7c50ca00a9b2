"""Runs faults against a fresh service and prints what they cost: `make chaos ARGS="--times 20 --clients 50"`."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
from ray import serve
from ray.serve.schema import ApplicationStatus

from tests.chaos.faults import FAULTS, Fault
from tests.chaos.load import Load, Oracle, Question, oracle_of
from tests.chaos.processes import processes
from tests.chaos.table import HEAD, Trial, rows, text, trial_of
from tests.cluster.live.service import APP, BASE_ID, TOKEN, LiveService, args_for, live_service, ray_cluster
from tests.support.adapters import make_adapter
from tests.support.bases import make_base

NUM_TOKENS = 96
WARM_S = 2.0
"""How long the load runs before a strike."""
AFTER_S = 2.0
"""How long it runs once all is well again."""
LIMIT_S = 180.0
"""How long the service may take to be whole again."""
PROMPTS = ("Hello", "The quick brown fox", "user: What is", "Once upon a time there was")


def fresh_world(root: Path) -> dict[str, Any]:
    """Write a base and adapters; return the `args` of a service over them. One worker has room for all clients."""
    base = make_base(root / "base")
    for number, (key, kind) in enumerate({"one": "rank16", "two": "rank16", "thin": "rank4_qv"}.items()):
        make_adapter(root / "adapters" / key, base, kind, seed=number)
    args = args_for(root)
    args["adapters"]["preload"] = [
        {"name": name, "source": "demo", "key": name, "warm": "all"} for name in ("one", "two")
    ]
    args["worker"] |= {"max_running": 32, "max_queued_requests": 64, "kv_bytes": "16MiB"}
    return args


def is_whole(service: LiveService, gone: frozenset[int]) -> bool:
    """Return True if every process is there, answers, and none is left of those that were to go."""
    found = processes()
    pids = {process.pid for each in found.values() for process in each}
    if pids & gone or any(process.status() == psutil.STATUS_STOPPED for each in found.values() for process in each):
        return False
    try:
        application = serve.status().applications[APP]
        if application.status != ApplicationStatus.RUNNING:
            return False
        if any(set(service.states_of(name)) != {"RUNNING"} for name in application.deployments):
            return False
        numbers = {name: service.states_of(name)["RUNNING"] for name in application.deployments}
        titles = {"worker": "worker", "store": "adapter_store", "controller": "controller", "ingress": "ingress"}
        if any(len(found.get(kind, ())) != numbers[name] for kind, name in titles.items()):
            return False  # Serve may not have noticed yet
        listed = service.workers()
        return (
            service.http.get("/readyz").status_code == 200
            and service.http.get("/admin/v1/adapters").status_code == 200
            and len(listed) == numbers["worker"]
            and len(found.get("proxy", ())) >= 1
        )
    except Exception:
        return False  # also Serve's controller may be away


def run(service: LiveService, fault: Fault, oracle: Oracle, num_clients: int) -> Trial:
    """Strike once under load, and wait until all is well."""
    with Load(service.url, oracle, num_clients) as load:
        time.sleep(WARM_S)
        struck_s = time.monotonic()
        gone = fault.strike(service)
        whole_s = await_whole(service, gone, fault)
        time.sleep(AFTER_S)
    trial = trial_of(fault.name, num_clients, struck_s, whole_s, load.outcomes)
    fault.undo(service)
    await_whole(service, frozenset(), fault)
    check_tidy(service)
    return trial


def await_whole(service: LiveService, gone: frozenset[int], fault: Fault) -> float:
    """Wait until the service is whole; return when it was."""
    deadline_s = time.monotonic() + LIMIT_S
    time.sleep(0.2)
    while not is_whole(service, gone):
        if time.monotonic() > deadline_s:
            raise TimeoutError(f"{fault.name}: the service is not whole again within {LIMIT_S:.0f} s")
        time.sleep(0.2)
    return time.monotonic()


def check_tidy(service: LiveService) -> None:
    """Nothing of a request may be left on a worker."""
    deadline_s = time.monotonic() + 15
    while True:
        left = [w for w in service.workers() if w["running"] or w["waiting"] or w["leases"]]
        if not left:
            return
        if time.monotonic() > deadline_s:
            raise AssertionError(f"requests are left over: {left}")
        time.sleep(0.2)


def main() -> int:
    """Run what is asked for."""
    parser = argparse.ArgumentParser(prog="make chaos", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--times", type=int, default=1, help="strikes of each fault; the full run has 20")
    parser.add_argument("--clients", type=int, default=12, help="requests under way at all times; the full run has 50")
    parser.add_argument("--only", action="append", default=[], help="faults whose name has this word (repeatable)")
    parser.add_argument("--out", type=Path, help="append each trial to this file, a JSON object a line")
    options = parser.parse_args()
    faults = [f for f in FAULTS if not options.only or any(word in f.name for word in options.only)]
    trials: list[dict[str, Any]] = []
    problems: list[str] = []
    with (
        tempfile.TemporaryDirectory(prefix="chaos-") as folder,
        ray_cluster(LORAFLEET_ADMIN_TOKEN=TOKEN),
        live_service(Path(folder), fresh_world(Path(folder))) as service,
    ):
        models = (BASE_ID, "one", "two")
        oracle = oracle_of(service.url, [Question(m, p, NUM_TOKENS) for m in models for p in PROMPTS])
        for time_ in range(options.times):
            for fault in faults:
                trial = run(service, fault, oracle, options.clients)
                trials.append(trial.row())
                print(f"{time_ + 1}/{options.times} {json.dumps(trial.row())}", flush=True)
                problems += judge(fault, trial)
                if options.out is not None:
                    with options.out.open("a") as out:
                        out.write(json.dumps(trial.row()) + "\n")
    print(text(HEAD, rows(trials)))
    for problem in problems:
        print(f"MISSED {problem}", file=sys.stderr)
    return int(bool(problems))


def judge(fault: Fault, trial: Trial) -> list[str]:
    """Return what must not have happened."""
    found = []
    if trial.num_wrong:
        found.append(f"{fault.name}: {trial.num_wrong} answers with wrong tokens")
    if fault.is_harmless and trial.num_whole < trial.num_requests:
        found.append(f"{fault.name}: failed {trial.num_requests - trial.num_whole} requests")
    return found


if __name__ == "__main__":
    raise SystemExit(main())
