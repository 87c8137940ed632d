"""Writes what the broker did to its parent, at once, and so that no guest can flood it.

Every request that is let through is told before its answer goes on, and waits if the parent does not read: nothing
leaves unseen. Refusals cost a guest nothing, so equal ones within a second become one line with a count, and too many
different ones a line for each rule.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections import Counter
from dataclasses import replace

from vmsandbox.egress.values import EgressEvent, EgressKind
from vmsandbox.egress.wire import event_to_json

_WINDOW = 1.0  # seconds in which equal refusals become one
_KEPT = 2000  # different refusals remembered within a window
_REFUSALS, _REFUSALS_BURST = 50.0, 300.0  # different ones per second
_REQUESTS, _REQUESTS_BURST = 200.0, 2000.0
_MERGED = (EgressKind.REFUSED, EgressKind.FAILED, EgressKind.LIMIT)


class Bucket:
    """So many per second, and some at once (token bucket)."""

    def __init__(self, rate: float, burst: float) -> None:
        self._rate, self._burst = rate, burst
        self._left, self._since = burst, time.monotonic()

    def take(self, amount: float = 1) -> float:
        """Take it now; seconds to wait until it was there (0: it was)."""
        now = time.monotonic()
        self._left = min(self._burst, self._left + (now - self._since) * self._rate) - amount
        self._since = now
        return max(0.0, -self._left / self._rate)

    def has(self, amount: float = 1) -> bool:
        """Take it if it is there."""
        if self.take(0) > 0 or self._left < amount:
            return False
        self._left -= amount
        return True


class Recorder:
    """Writes events, one JSON line each, to a descriptor."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._different = Bucket(_REFUSALS, _REFUSALS_BURST)
        self._requests = Bucket(_REQUESTS, _REQUESTS_BURST)
        self._again: Counter[tuple[object, ...]] = Counter()
        self._over: Counter[tuple[EgressKind, str]] = Counter()
        self._known: dict[tuple[object, ...], EgressEvent] = {}
        self._timer: asyncio.TimerHandle | None = None

    async def room(self) -> None:
        """Wait until another request may be told of."""
        if wait := self._requests.take():
            await asyncio.sleep(wait)

    def tell(self, event: EgressEvent) -> None:
        """Tell at once; refusals are merged (see the module)."""
        if event.kind in _MERGED:
            self._merge(event)
        else:
            self._write(event)

    def flush(self) -> None:
        """Tell what was held back."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        again, over = self._again, self._over
        known, self._known = self._known, {}
        self._again, self._over = Counter(), Counter()
        for key, count in again.items():
            first = known[key]
            self._write(replace(first, time=time.time(), more={**first.more, "count": str(count)}))
        for (kind, rule), count in over.items():
            more = {"count": str(count)}
            self._write(EgressEvent(kind, time.time(), rule=rule, reason="too many to tell one by one", more=more))

    def _merge(self, event: EgressEvent) -> None:
        key = (event.kind, event.via, event.host, event.port, event.method, event.path, event.rule, event.status)
        if key in self._known:
            self._again[key] += 1
        elif len(self._known) < _KEPT and self._different.has():
            self._known[key] = event
            self._write(event)
        else:
            self._over[event.kind, event.rule] += 1
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(_WINDOW, self.flush)

    def _write(self, event: EgressEvent) -> None:
        view = memoryview(event_to_json(event))
        try:
            while view:  # a full pipe holds everything up: what cannot be told is not done
                view = view[os.write(self._fd, view) :]
        except BrokenPipeError:
            os._exit(0)  # nobody is there to tell
