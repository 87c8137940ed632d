"""Named places where a test makes the program die, fail or pause, so that "whatever happens" is tried and not hoped.

A fault between two steps cannot be made from outside at the right moment. Code that must survive one says
`failpoint("apply.committed")` after each step; that costs one comparison unless a test has switched something on:

    VMSANDBOX_FAILPOINT=NAME[#K]=ACTION[,…]     at the K-th time (from 1) that NAME is reached

    kill            SIGKILL to this process             enospc, eio, edquot     an OSError with that errno
    interrupt       KeyboardInterrupt, as Ctrl-C        pause:SECONDS           go on after that long
    int, term, hup  that signal to this process         tell:PATH               make that file, wait until it is gone

`*=note:PATH` writes down every name that is reached, in order.

In the same process: `with failpoints.switched_on(function)`, which is called with each name that is reached.
"""

from __future__ import annotations

import errno
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

VARIABLE = "VMSANDBOX_FAILPOINT"
_SIGNALS = {"int": signal.SIGINT, "term": signal.SIGTERM, "hup": signal.SIGHUP}
_ERRNOS = {"enospc": errno.ENOSPC, "eio": errno.EIO, "edquot": errno.EDQUOT}


def failpoint(name: str) -> None:
    """This place is reached."""
    if _reached is not None:
        _reached(name)


@contextmanager
def switched_on(reached: Callable[[str], None]) -> Iterator[None]:
    """Call `reached` with the name of each failpoint that is reached; it may raise."""
    global _reached
    before, _reached = _reached, reached
    try:
        yield
    finally:
        _reached = before


def act(action: str, name: str = "") -> None:
    """Make one of the faults that the module's docstring lists happen. Raises ValueError for another."""
    if action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif action == "interrupt":
        raise KeyboardInterrupt
    elif action in _SIGNALS:
        # To this thread, so that it comes now: the main one, in the program that is tried.
        signal.raise_signal(_SIGNALS[action])
    elif action in _ERRNOS:
        raise OSError(_ERRNOS[action], os.strerror(_ERRNOS[action]), name)
    elif action.startswith("pause:"):
        time.sleep(float(action.removeprefix("pause:")))
    elif action.startswith("note:"):
        with Path(action.removeprefix("note:")).open("a") as file:
            file.write(f"{name}\n")
    elif action.startswith("tell:"):
        path = Path(action.removeprefix("tell:"))
        path.write_text(name)
        while path.exists():
            time.sleep(0.01)
    else:
        raise ValueError(f"{VARIABLE}: unknown action {action!r}")


def _from(text: str) -> Callable[[str], None] | None:
    """What the variable's text asks for. A misspelt one is an error: a test would pass without its fault."""
    if not text:
        return None
    wanted: dict[tuple[str, int], str] = {}
    for one in text.split(","):
        place, equals, action = one.partition("=")
        name, _, count = place.partition("#")
        if not (name and equals and action):
            raise ValueError(f"{VARIABLE}: not NAME[#K]=ACTION: {one!r}")
        wanted[name, int(count or 1)] = action
    times: Counter[str] = Counter()

    def reached(name: str) -> None:
        if everywhere := wanted.get(("*", 1)):
            act(everywhere, name)
        times[name] += 1
        if action := wanted.get((name, times[name])):
            act(action, name)

    return reached


_reached = _from(os.environ.get(VARIABLE, ""))
