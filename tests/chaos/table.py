"""Tables of what the faults cost, from the outcomes that the clients counted."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tests.chaos.load import Outcome

HEAD = (
    "fault",
    "clients",
    "requests",
    "whole",
    "failed before a token",
    "ended by one error event",
    "cut",
    "wrong",
    "new requests failed for (s)",
    "longest pause (s)",
    "all back after (s)",
    "CPU of new processes (s)",
)


@dataclass(frozen=True, slots=True)
class Trial:
    """One strike of one fault, and what the requests saw that were under way then or began before all was well."""

    fault: str
    num_clients: int
    whole_again_s: float
    """From the strike until every process is there and answers."""
    num_requests: int
    num_whole: int
    num_unbegun: int
    """Requests that failed and had sent no token."""
    num_error_events: int
    """Begun streams that ended by exactly one error event."""
    num_cut: int
    """Begun streams that ended without one."""
    num_wrong: int
    failing_s: float
    """From the strike until the last request that failed was begun; 0 if all that failed were under way."""
    longest_pause_s: float
    """Longest time without a token in a stream that came to its end."""
    start_cpu_s: float
    """CPU time of the processes that were started in place of others, until all was well."""
    failures: dict[str, int]
    """Kinds of failures, with the codes of errors."""

    def row(self) -> dict[str, Any]:
        """The trial as plain data."""
        return asdict(self)


def trial_of(
    fault: str, num_clients: int, struck_s: float, whole_s: float, outcomes: Iterable[Outcome], start_cpu_s: float = 0.0
) -> Trial:
    """Count what came of the requests that ended after the strike."""
    seen = [outcome for outcome in outcomes if outcome.ended_s >= struck_s and outcome.began_s <= whole_s]
    failed = [outcome for outcome in seen if outcome.is_failed]
    begun = [outcome for outcome in failed if outcome.num_tokens]
    return Trial(
        fault=fault,
        num_clients=num_clients,
        whole_again_s=whole_s - struck_s,
        num_requests=len(seen),
        num_whole=len(seen) - len(failed),
        num_unbegun=sum(not outcome.num_tokens and outcome.kind != "wrong" for outcome in failed),
        num_error_events=sum(outcome.kind == "error_event" for outcome in begun),
        num_cut=sum(outcome.kind in ("cut", "silent") for outcome in begun),
        num_wrong=sum(outcome.kind == "wrong" for outcome in failed),
        failing_s=max((outcome.began_s - struck_s for outcome in failed if outcome.began_s > struck_s), default=0.0),
        longest_pause_s=max((outcome.longest_gap_s for outcome in seen if not outcome.is_failed), default=0.0),
        start_cpu_s=start_cpu_s,
        failures=dict(
            Counter(
                " ".join(
                    filter(None, (outcome.kind, outcome.detail[:100], "" if outcome.is_streamed else "(not streamed)"))
                )
                for outcome in failed
            )
        ),
    )


def rows(trials: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    """A row for each fault: counts over all its trials, the longest times, and the median of CPU."""
    found = []
    for fault in dict.fromkeys(trial["fault"] for trial in trials):
        of = [trial for trial in trials if trial["fault"] == fault]
        counts = ("num_requests", "num_whole", "num_unbegun", "num_error_events", "num_cut", "num_wrong")
        cpu_s = [trial["start_cpu_s"] for trial in of if "start_cpu_s" in trial]
        times = ("failing_s", "longest_pause_s", "whole_again_s")
        found.append(
            (
                f"{fault} ({len(of)} times)" if len(of) > 1 else fault,
                " and ".join(str(number) for number in sorted({trial["num_clients"] for trial in of})),
                *(str(sum(trial[key] for trial in of)) for key in counts),
                *(f"{max(trial[key] for trial in of):.1f}" for key in times),
                f"{statistics.median(cpu_s):.1f}" if cpu_s else "-",
            )
        )
    return found


def text(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """Columns for a terminal."""
    widths = [max(len(row[column]) for row in (head, *body)) for column in range(len(head))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in (head, *body)
    )


HOSTILE_HEAD = (
    "hostile client",
    "others' gap, p99 (ms)",
    "while attacked (ms)",
    "others' longest gap (s)",
    "others' requests failed",
    "its replies",
)


@dataclass(frozen=True, slots=True)
class Siege:
    """One attack, and what others felt of it."""

    hostile: str
    num_clients: int
    gap_before_s: float
    """99th percentile of the time between two events of a stream."""
    gap_s: float
    longest_gap_s: float
    num_requests: int
    num_failed: int
    replies: dict[str, int]
    """What the hostile client got: statuses, and how connections ended."""

    @property
    def gap_ratio(self) -> float:
        """How much longer others waited for a token."""
        return self.gap_s / max(self.gap_before_s, 1e-9)

    def row(self) -> dict[str, Any]:
        """The attack as plain data."""
        return asdict(self)


def siege_of(
    kind: str, num_clients: int, before: Sequence[Outcome], during: Sequence[Outcome], replies: dict[str, int]
) -> Siege:
    """Count what came of others' requests before an attack and while it went on."""
    gaps = sorted(gap for outcome in during for gap in outcome.gaps_s)
    return Siege(
        hostile=kind,
        num_clients=num_clients,
        gap_before_s=_percentile(sorted(gap for outcome in before for gap in outcome.gaps_s), 0.99),
        gap_s=_percentile(gaps, 0.99),
        longest_gap_s=max(gaps, default=0.0),
        num_requests=len(during),
        num_failed=sum(outcome.is_failed for outcome in during),
        replies=replies,
    )


def _percentile(ordered: Sequence[float], share: float) -> float:
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0


def hostile_rows(sieges: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    """A row for each kind of client, of its last attack."""
    last = {siege["hostile"]: siege for siege in sieges}
    return [
        (
            kind,
            f"{siege['gap_before_s'] * 1e3:.0f}",
            f"{siege['gap_s'] * 1e3:.0f}",
            f"{siege['longest_gap_s']:.1f}",
            f"{siege['num_failed']} of {siege['num_requests']}",
            ", ".join(f"{reply} x {count}" for reply, count in sorted(siege["replies"].items())),
        )
        for kind, siege in last.items()
    ]
