"""A long run of mixed operations, and how fast each process grows by it."""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import psutil

from tests.chaos.processes import processes
from tests.cluster.live.service import BASE_ID, LiveService

RATE = 5.0
"""Operations a second, unless told otherwise."""
SAMPLE_S = 5.0
KEYS = ("one", "two", "thin")


def operate(service: LiveService, number: int) -> int:
    """Do one operation; returns its status. Eight in ten are requests, the others load, list and delete adapters."""
    name = f"soak{number // 10 % 7}"
    match number % 10:
        case 0:
            return service.put(name, KEYS[number // 10 % len(KEYS)]).status_code
        case 5:
            return service.http.get("/admin/v1/adapters").status_code
        case 9:
            return service.http.delete(f"/admin/v1/adapters/{name}").status_code
        case 3 | 7:
            return 200 if service.stream(BASE_ID, max_tokens=16, user=f"u{number}")[-1] else 500
        case _:
            return service.complete((BASE_ID, "one", "two")[number % 3], max_tokens=4).status_code


def soak(service: LiveService, minutes: float, rate: float = RATE) -> dict[str, float]:
    """Operate for so long. Returns how fast resident memory grew over the last two thirds, in MB an hour."""
    samples: defaultdict[str, list[tuple[float, int]]] = defaultdict(list)
    began_s = time.monotonic()
    sampled_s = 0.0
    statuses: defaultdict[int, int] = defaultdict(int)
    with ThreadPoolExecutor(8) as pool:
        number = 0
        while (now_s := time.monotonic() - began_s) < minutes * 60:
            pending = [pool.submit(operate, service, number + i) for i in range(int(rate))]
            number += len(pending)
            for future in pending:
                statuses[future.result()] += 1
            if now_s - sampled_s >= SAMPLE_S:
                sampled_s = now_s
                for kind, each in processes().items():
                    for process in each:
                        with contextlib.suppress(psutil.Error):
                            samples[f"{kind} {process.pid}"].append((now_s, process.memory_info().rss))
            time.sleep(max(0.0, number / rate - (time.monotonic() - began_s)))
    print(f"{number} operations, by status: {dict(statuses)}")
    return {name: slope(each[len(each) // 3 :]) for name, each in samples.items() if len(each) > 6}


def slope(samples: Sequence[tuple[float, int]]) -> float:
    """Least squares' slope, in MB an hour."""
    mean_s = sum(at for at, _ in samples) / len(samples)
    mean_bytes = sum(size for _, size in samples) / len(samples)
    rise = sum((at - mean_s) * (size - mean_bytes) for at, size in samples)
    return rise / sum((at - mean_s) ** 2 for at, _ in samples) * 3600 / 1e6
