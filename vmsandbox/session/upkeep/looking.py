"""Look at something again and again while a command runs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from vmsandbox.errors import VmsandboxError

_LAST = 5.0  # seconds that a look may take to its end


@contextmanager
def looking(name: str, look: Callable[[], float], first: float) -> Iterator[None]:
    """Call `look` in a thread of this name while the block runs.

    Args:
        look: returns the seconds until the next look. One that fails is tried again after as many as before.
        first: seconds until the first look.
    """
    end = threading.Event()

    def run() -> None:
        patience = first
        while not end.wait(patience):
            with suppress(VmsandboxError, OSError):
                patience = look()

    thread = threading.Thread(target=run, name=name, daemon=True)
    thread.start()
    try:
        yield
    finally:
        end.set()
        thread.join(_LAST)
