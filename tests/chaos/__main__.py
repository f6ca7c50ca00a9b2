"""Runs faults and hostile clients against a fresh service, and prints what they cost.

`make chaos` runs each fault once under a few clients; the full run is `make chaos ARGS="--times 20 --clients 50"`.
With `--haproxy` the same is done behind HAProxy and two ingresses, with `--nodes` nodes leave a cluster of several.
`make soak` prints how fast each process grows, and fails above a bound.

Several runs may go on side by side on one machine: each has a Ray and ports of its own. They may append to one file.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from random import Random
from typing import Any

import httpx
import ray

from tests.chaos.faults import FAULTS, HAPROXY_FAULTS, Fault, haproxy_environment
from tests.chaos.health import await_whole, leftovers
from tests.chaos.hostile import KINDS, attacker
from tests.chaos.ledger import Budget, Ledger
from tests.chaos.load import Load, Oracle, Question, oracle_of
from tests.chaos.nodes import WORKER_CPUS, node_faults, ray_nodes
from tests.chaos.ports import ports_of_a_run
from tests.chaos.processes import adopt_orphans, cpu_s_beside, processes
from tests.chaos.soak import RATE, soak
from tests.chaos.table import Siege, Trial, siege_of, trial_of
from tests.cluster.live.service import BASE_ID, TOKEN, LiveService, args_for, live_service, ray_cluster
from tests.support.adapters import make_adapter
from tests.support.bases import make_base
from tests.support.damaged_state import States
from tests.support.wait import eventually

NUM_TOKENS = 96
WARM_S = 1.0
"""How long the load runs before a strike, once each client has asked."""
AFTER_S = 0.5
"""How long it runs once all is well again."""
SIEGE_S = 10.0
"""How long hostile clients attack, and how long the same load is watched before."""
PROMPTS = ("Hello", "The quick brown fox", "user: What is", "Once upon a time there was")
MAX_RISE = 10.0
"""MB an hour by which a process may grow in a soak of `WARM_MINUTES` or more; in a shorter one it is not yet warm."""
WARM_MINUTES = 20.0
MAX_GAP_RATIO = 1.5
"""Of others' 99th percentile between two tokens, while hostile clients attack."""


def fresh_args(root: Path) -> dict[str, Any]:
    """Write a base and adapters; return the `args` of a service over them. One worker has room for all clients."""
    base = make_base(root / "base")
    for number, (key, kind) in enumerate({"one": "rank16", "two": "rank16", "thin": "rank4_qv"}.items()):
        make_adapter(root / "adapters" / key, base, kind, seed=number)
    args = args_for(root)
    args["adapters"]["preload"] = [
        {"name": name, "source": "demo", "key": name, "warm": "all"} for name in ("one", "two")
    ]
    args["worker"] |= {"max_running": 32, "max_queued_requests": 64, "kv_bytes": "16MiB", "spare_processes": 1}
    return args


def strike(service: LiveService, fault: Fault, oracle: Oracle, num_clients: int) -> Trial:
    """Strike once under load, and wait until all is well."""
    fault.prepare(service)
    old = frozenset(process.pid for each in processes().values() for process in each)
    with Load(service.url, oracle, num_clients) as load:
        eventually(lambda: len(load.under_way) == num_clients)
        time.sleep(WARM_S)
        struck_s = time.monotonic()
        whole_s = await_whole(service, fault.strike(service))
        start_cpu_s = cpu_s_beside(old)
        time.sleep(AFTER_S)
    return trial_of(fault.name, num_clients, struck_s, whole_s, load.outcomes, start_cpu_s)


def besiege(service: LiveService, kind: str, oracle: Oracle, num_clients: int) -> Siege:
    """Watch the gaps between others' tokens before and during an attack."""
    with attacker(service.url, kind, SIEGE_S) as attack:
        with Load(service.url, oracle, num_clients) as before:
            time.sleep(SIEGE_S)
        with Load(service.url, oracle, num_clients) as during:
            replies = attack()
    await_whole(service)
    return siege_of(kind, num_clients, before.outcomes, during.outcomes, replies)


def damage(num_trials: int) -> dict[str, Any]:
    """Damage a byte of a state folder and start a store on it, so often. Raises AssertionError where that fails."""
    random = Random(num_trials)
    with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
        states = States(Path(folder))
        named = Counter(" and ".join(states.damage(random)) or "nothing is lost" for _ in range(num_trials))
    return {"damage": num_trials, "named": dict(named)}


def judge(service: LiveService, fault: Fault, trial: Trial) -> Iterator[str]:
    """Say what must not have happened."""
    if trial.num_wrong:
        yield f"{fault.name}: {trial.num_wrong} answers with wrong tokens"
    if fault.is_harmless and trial.num_whole < trial.num_requests:
        yield f"{fault.name}: failed {trial.num_requests - trial.num_whole} requests"
    for leftover in leftovers(service):
        yield f"{fault.name}: {leftover}"


@contextmanager
def running(options: argparse.Namespace) -> Iterator[tuple[LiveService, tuple[Fault, ...]]]:
    """A service as the options have it, and the faults that are put to it."""
    with ExitStack() as stack:
        ports = stack.enter_context(ports_of_a_run())
        folder = options.folder
        if folder is None:
            made = tempfile.TemporaryDirectory(prefix="chaos-", ignore_cleanup_errors=True)
            folder = Path(stack.enter_context(made))
        environment = {"LORAFLEET_ADMIN_TOKEN": TOKEN, "RAY_TMPDIR": str(folder)}
        args = fresh_args(folder)
        if options.nodes:
            args["worker"]["num_cpus"] = WORKER_CPUS
            nodes = stack.enter_context(ray_nodes(**environment))
            yield stack.enter_context(live_service(folder, args, ports.one())), node_faults(nodes)
            return
        environment |= haproxy_environment(folder, ports) if options.haproxy else {}
        stack.enter_context(ray_cluster(**environment))
        service = stack.enter_context(live_service(folder, args, ports.one()))
        if options.haproxy:
            service.deploy(num_workers=2, num_ingresses=2)
            await_whole(service)
        yield service, HAPROXY_FAULTS if options.haproxy else FAULTS


def chosen(names: str, words: list[str]) -> bool:
    """Return True if one of the words is in the names, or if there is no word."""
    return not words or any(word in names for word in words)


def run_faults(
    service: LiveService, faults: tuple[Fault, ...], options: argparse.Namespace, ledger: Ledger, budget: Budget
) -> None:
    """Strike with each fault that is asked for, in turn, and attack with each hostile client."""
    questions = [Question(model, prompt, NUM_TOKENS) for model in (BASE_ID, "one", "two") for prompt in PROMPTS]
    oracle = oracle_of(service.url, questions)
    faults = tuple(fault for fault in faults if chosen(fault.names, options.only))
    kinds = [kind for kind in KINDS if chosen(kind, options.only) and not (options.haproxy or options.nodes)]
    for _ in range(options.times):
        for fault in faults:
            if not budget.has_room(fault.names):
                continue
            began_s = time.monotonic()
            each: Fault | None = fault
            while each is not None:
                trial = strike(service, each, oracle, options.clients)
                ledger.note(trial.row())
                ledger.miss(judge(service, each, trial))
                each = each.then
            budget.took(fault.names, time.monotonic() - began_s)
        for kind in kinds:
            if budget.has_room(kind):
                siege = besiege(service, kind, oracle, options.clients)
                budget.took(kind, 2 * SIEGE_S)
                ledger.note(siege.row())
                if siege.gap_ratio > MAX_GAP_RATIO or siege.num_failed:
                    ledger.miss([f"{kind}: gaps x {siege.gap_ratio:.1f}, {siege.num_failed} requests failed"])


def main() -> int:
    """Run what is asked for."""
    parser = argparse.ArgumentParser(
        prog="make chaos", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--times", type=int, default=1, help="strikes of each fault")
    parser.add_argument("--clients", type=int, default=12, help="requests that are under way at all times")
    parser.add_argument("--only", action="append", default=[], help="what has this word in its name; repeatable")
    parser.add_argument("--flips", type=int, default=60, help="damaged bytes of the state folder; in full 1000")
    parser.add_argument("--haproxy", action="store_true", help="with HAProxy in the place of Serve's proxy")
    parser.add_argument("--nodes", action="store_true", help="with several nodes, of which one leaves")
    parser.add_argument("--soak", type=float, metavar="MINUTES", help="only operate for so long, and print growth")
    parser.add_argument("--rate", type=float, default=RATE, help="operations a second of a soak")
    parser.add_argument("--out", type=Path, help="append what was measured to this file, a JSON object a line")
    parser.add_argument("--budget-s", type=float, help="begin no trial that would not end within so many seconds")
    parser.add_argument("--folder", type=Path, help="an empty folder to work in, which is kept, with Ray's logs")
    options = parser.parse_args()
    budget = Budget(options.budget_s)
    ledger = Ledger(options.out)
    adopt_orphans()
    if options.soak is None:
        cores = len(os.sched_getaffinity(0))
        ledger.note({"run": {"clients": options.clients, "cores": cores, "ray": ray.__version__}})
    if options.soak is None and not (options.haproxy or options.nodes) and chosen("a damaged byte", options.only):
        ledger.note(damage(options.flips))
    with running(options) as (service, faults):
        if options.soak is not None:
            rises = soak(service, options.soak, options.rate)
            ledger.note({"soak": options.soak, "rate": options.rate, "mb_per_hour": rises})
            for name, rise in rises.items():
                print(f"{name:>24} {rise:8.1f} MB/h")
            return int(options.soak >= WARM_MINUTES and max(rises.values()) > MAX_RISE)
        try:
            run_faults(service, faults, options, ledger, budget)
        except (TimeoutError, AssertionError, httpx.HTTPError) as error:
            ledger.miss([str(error)])
        finally:
            status = ledger.close()
    return status


if __name__ == "__main__":
    raise SystemExit(main())
