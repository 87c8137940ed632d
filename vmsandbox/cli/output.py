"""What the terminal shows: progress, tables, JSON, and the guest's output through a filter."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from vmsandbox.errors import UserInputError
from vmsandbox.monitor import Monitor

# What followed "--" on the command line: a command for the guest. Click cannot tell `session -- x` from `session x`.
_guest_command: list[str] | None = None
FOREVER = "forever"


def split_command(argv: list[str]) -> list[str]:
    """Take the guest's command (after the first "--") off; returns vmsandbox's own arguments."""
    global _guest_command
    if "--" not in argv:
        _guest_command = None
        return _with_value(argv)
    at = argv.index("--")
    _guest_command = argv[at + 1 :]
    return _with_value(argv[:at])


def _with_value(argv: list[str]) -> list[str]:
    """Click knows no options that may have a value: `--wait` is `--wait=forever`, where it is ours."""
    if argv[:1] not in (["session"], ["start"]):
        return argv  # the words of `exec` are the guest's
    return [f"{word}={FOREVER}" if word == "--wait" else word for word in argv]


def patience(wait: str) -> float | None:
    """Seconds that `--wait` says (0: it was not given); None for ever. Raises UserInputError."""
    if wait == FOREVER:
        return None
    try:
        seconds = float(wait or 0)
        if 0 <= seconds < 10**9:
            return seconds
    except ValueError:
        pass
    raise UserInputError(f"--wait={wait}: not a number of seconds", resolution="--wait, or --wait=60")


def guest_command() -> list[str] | None:
    """The command for the guest, None if there was none."""
    return _guest_command or None


def wants_json(arguments: Sequence[str]) -> bool:
    """Whether errors have to be JSON as well."""
    return "--json" in arguments


def print_json(value: object) -> None:
    """One JSON document on stdout."""
    print(json.dumps(value, indent=1, sort_keys=True))


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Columns for people; plain and unwrapped when stdout is no terminal."""
    widths = [max(len(str(row[i])) for row in [columns, *rows]) for i in range(len(columns))]
    for row in [columns, *rows]:
        print("  ".join(str(cell).ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def tell_differences(differs: Sequence[str]) -> None:
    """Say after a session's end what is not as it was before it."""
    for one in differs:
        print(f"vmsandbox: WARNING: not as it was before the session: {one}", file=sys.stderr)


class PlainMonitor(Monitor):
    """Progress as lines on stderr, for logs and pipes: one when a step begins, one when it took long."""

    @contextmanager
    def step(self, title: str) -> Iterator[None]:
        began = time.monotonic()
        self._say(title)
        yield
        seconds = time.monotonic() - began
        if seconds >= 10:
            self._say(f"{title}: done in {seconds:.0f} s")

    def notice(self, text: str) -> None:
        self._say(text)

    def warning(self, text: str) -> None:
        self._say(f"WARNING: {text}")

    def _say(self, text: str) -> None:
        print(f"vmsandbox: {text}", file=sys.stderr, flush=True)


class TerminalMonitor(PlainMonitor):
    """Progress as a live line with a bar, on stderr."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        self._console = Console(stderr=True, highlight=False)
        self._new_progress: Callable[[], Progress] = lambda: Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[note]}", markup=False),
            TimeElapsedColumn(),
            console=self._console,
            transient=True,
        )
        self._progress: Progress | None = None
        self._tasks: list[Any] = []

    @contextmanager
    def step(self, title: str) -> Iterator[None]:
        outermost = self._progress is None
        began = time.monotonic()
        if self._progress is None:
            self._progress = self._new_progress()
            self._progress.start()
        progress = self._progress
        task = progress.add_task(title, total=None, note="")
        self._tasks.append(task)
        done = False
        try:
            yield
            done = True
        finally:
            self._tasks.remove(task)
            progress.remove_task(task)
            if outermost:
                progress.stop()
                self._progress = None
            if done:
                self._console.print(f"✓ {title}  ({time.monotonic() - began:.1f} s)", style="green", markup=False)

    def progress(self, done: float, total: float | None = None, note: str = "") -> None:
        if self._progress is not None and self._tasks:
            self._progress.update(self._tasks[-1], completed=done, total=total, note=note[:60])

    def notice(self, text: str) -> None:
        self._console.print(f"• {text}", markup=False)

    def warning(self, text: str) -> None:
        self._console.print(f"! {text}", style="bold yellow", markup=False)


def make_monitor() -> Monitor:
    """Live progress on a terminal, lines elsewhere."""
    if sys.stderr.isatty() and os.environ.get("TERM") != "dumb":
        return TerminalMonitor()
    return PlainMonitor()


def guest_output(fd: int) -> Callable[[bytes], None]:
    """A sink for the guest's output: as it is into a file or pipe, filtered onto a terminal."""
    from vmsandbox.guest.streams import write_all

    write = write_all(fd)
    if not os.isatty(fd):
        return write
    from vmsandbox.review.terminal import TerminalFilter

    safe = TerminalFilter()
    return lambda untrusted: write(safe.feed(untrusted))
