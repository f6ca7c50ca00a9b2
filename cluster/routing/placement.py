"""Chooses the worker for a request. Pure: no Ray, no clock of its own, no I/O.

Policy: power of two choices. Two workers are drawn of those where the adapter is resident or was sent a moment ago. The
less loaded one takes the request.

Fallback: if that one is busier than the less loaded of two other workers by more than `spill_gap`, the other takes the
request and loads the adapter. So a hot adapter spreads and a cold one stays where it is.

An adapter that is resident nowhere goes to the less loaded of two workers; at equal load, to the one with more free
pages. Requests for the base do the same. While no worker can fetch adapters, a request waits for one that has its
adapter.

Loads count the requests of other routers too, as workers report them, but divided by the number of routers. Reports are
old, and all routers read the same ones: if each made up for a difference whole, they would all send to one worker at
once. Divided, they make up for it once together.

Bound: a worker holds at most `max_load` requests of this router. If all workers are full, none is chosen and the
request waits.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from lorafleet.cluster.wire import VERSION_PREFIX

MAX_REMEMBERED = 4096
"""Versions whose last choices are remembered."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A worker as the router sees it now."""

    worker_id: str
    held: int
    """Requests of this router that it holds, running and waiting."""
    resident: Collection[str] = ()
    """Prefixes (`VERSION_PREFIX`) of the versions in its pool, as of its last report."""
    free_pages: int = 0
    others: int = 0
    """Requests of other routers that it holds, as of its last report."""
    num_routers: int = 2
    """Routers that send to it, with this one."""

    @property
    def load(self) -> float:
        """Requests that it holds, as they weigh in a choice."""
        return self.held + self.others / self.num_routers


@dataclass(slots=True)
class Placement:
    """Chooses workers and remembers what it sent where, for reports of residency lag behind."""

    max_load: int
    """Most requests on one worker."""
    spill_gap: int
    """How much busier than another worker one with the adapter may be before the other takes the request."""
    memory_s: float
    """How long a worker that was sent an adapter counts as having it without saying so."""
    rng: random.Random = field(default_factory=random.Random)
    _sent: dict[str, dict[str, float]] = field(default_factory=dict)

    def choose(
        self, version: str | None, candidates: Sequence[Candidate], now_s: float, *, only_resident: bool = False
    ) -> str | None:
        """The id of the worker that is to take a request for `version` (None: the base); None if all are full.

        only_resident: none but those that have said that they hold the version count, if there are any.
        Remembers the choice: call it once a request, right before sending it.
        """
        if only_resident and version is not None:
            holding = [candidate for candidate in candidates if version[:VERSION_PREFIX] in candidate.resident]
            candidates = holding or candidates
        open_ = [candidate for candidate in candidates if candidate.held < self.max_load]
        if not open_:
            return None
        if version is None:
            return self._lighter(open_).worker_id
        sent = self._recently_sent(version[:VERSION_PREFIX], now_s)
        warm: list[Candidate] = []
        cold: list[Candidate] = []
        for candidate in open_:
            has_it = version[:VERSION_PREFIX] in candidate.resident or candidate.worker_id in sent
            (warm if has_it else cold).append(candidate)
        chosen = self._lighter(warm or cold)
        if warm and cold:
            other = self._lighter(cold)
            if chosen.load - other.load > self.spill_gap:
                chosen = other
        self.remember(version, chosen.worker_id, now_s)
        return chosen.worker_id

    def remember(self, version: str, worker_id: str, now_s: float) -> None:
        """A worker was sent the version in another way."""
        version = version[:VERSION_PREFIX]
        sent = self._sent.pop(version, {})
        sent[worker_id] = now_s
        self._sent[version] = sent  # last again, so that the first is what was sent longest ago
        if len(self._sent) > MAX_REMEMBERED:
            del self._sent[next(iter(self._sent))]

    def forget(self, worker_id: str) -> None:
        """A worker is gone, and with it what was sent there."""
        for sent in self._sent.values():
            sent.pop(worker_id, None)

    def _lighter(self, candidates: Sequence[Candidate]) -> Candidate:
        """Power of two choices: draw two, take the less loaded, then the one with more free pages."""
        drawn = self.rng.sample(candidates, min(2, len(candidates)))
        return min(drawn, key=lambda candidate: (candidate.load, -candidate.free_pages))

    def _recently_sent(self, version: str, now_s: float) -> Collection[str]:
        sent = self._sent.get(version)
        if sent is None:
            return ()
        for worker_id in [worker_id for worker_id, at_s in sent.items() if now_s - at_s > self.memory_s]:
            del sent[worker_id]
        if not sent:
            del self._sent[version]
        return sent
