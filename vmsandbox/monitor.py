"""How long work tells what it is doing, without knowing who listens.

Steps emit to a `Monitor` that was passed in; the terminal draws it, `--json` and tests stay quiet. Nothing below
the command line prints.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class Monitor:
    """Listens to work in progress. This one is silent; the command line has one that draws."""

    @contextmanager
    def step(self, title: str) -> Iterator[None]:
        """One step with a beginning and an end ("building image base")."""
        yield

    def progress(self, done: float, total: float | None = None, note: str = "") -> None:
        """How far the innermost step is: `done` of `total` (None: unknown), with a short note."""

    def notice(self, text: str) -> None:
        """Something the person should know, once."""

    def warning(self, text: str) -> None:
        """Something the person must know."""
