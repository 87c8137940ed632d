"""What a command may write, and how an end by a limit is told: what the commands of this host have in common.

A session's time and idleness are watched by a process of its own (`session.watcher`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from vmsandbox.errors import GuestError, JournalError, VmsandboxError
from vmsandbox.journal import events
from vmsandbox.session.state.activity import note_activity
from vmsandbox.session.state.folder import SessionFolder
from vmsandbox.session.state.info import SessionInfo

if TYPE_CHECKING:  # every command imports this module
    from vmsandbox.session.live.running import RunningSandbox

EXIT_TIME = 124  # as timeout(1)
EXIT_OUTPUT = 153  # as a shell tells of a program that wrote more than `ulimit -f`: 128 + SIGXFSZ
_EVERY = 0.5  # seconds between two notes of activity
Sink = Callable[[bytes], None]


class LimitReachedError(VmsandboxError):
    """A limit of the policy was met. `exit_code`: 124 for the session's time and idleness, 153 for output."""

    def __init__(self, limit: str, value: float, resolution: str = "") -> None:
        self.limit = limit
        self.ends_session = limit != "output"
        self.exit_code = EXIT_TIME if self.ends_session else EXIT_OUTPUT
        brief, key = {
            "time": ("the session's time is up: its guest is gone", "session.time"),
            "idle": ("nothing was done in the session for too long: its guest is gone", "session.idle"),
            "output": ("the command was ended: it wrote more than it may", "resources.output"),
        }[limit]
        unit = "bytes" if limit == "output" else "seconds"
        super().__init__(brief, details=f"sandbox.{key}: {value:g} {unit}", resolution=resolution)


class Meter:
    """Counts what one command writes, and notes that something is going on in its session."""

    def __init__(self, sandbox: RunningSandbox) -> None:
        self._sandbox = sandbox
        self._limit = sandbox.info.output_bytes
        self._written = 0
        self._noted = 0.0

    def note(self) -> None:
        """Something was done. Cheap enough for every piece."""
        now = time.monotonic()
        if now - self._noted >= _EVERY:
            self._noted = now
            note_activity(self._sandbox.folder)

    def sink(self, onward: Sink) -> Sink:
        """`onward`, until the command's limit is met. What it returns raises LimitReachedError then."""

        def write(untrusted: bytes) -> None:
            self.note()
            self._written += len(untrusted)
            over = 0 if self._limit is None else self._written - self._limit
            onward(untrusted if over <= 0 else untrusted[: max(len(untrusted) - over, 0)])
            if over > 0 and self._limit is not None:
                self._sandbox.journal.append(events.LimitReached("output", self._limit))
                raise LimitReachedError("output", self._limit, "raise resources.output in the policy")

        return write


@contextmanager
def limited(sandbox: RunningSandbox) -> Iterator[Meter]:
    """Around one command: what it writes is counted, and an end of the session by a limit is told as such.

    Raises:
        LimitReachedError: instead of the error that the session's end caused.
    """
    from vmsandbox.session.upkeep.clock import clock_watch
    from vmsandbox.session.upkeep.disk_watch import disk_watch

    meter = Meter(sandbox)
    meter.note()
    try:
        with (
            disk_watch(sandbox.folder, sandbox.info, sandbox.monitor.warning),
            clock_watch(sandbox.folder, sandbox.info),
        ):
            yield meter
    except GuestError as error:
        if reached := ended_by_limit(sandbox.folder, sandbox.info):
            raise reached from error
        raise
    finally:
        note_activity(sandbox.folder)


@contextmanager
def ended_at_limit(channel: Any) -> Iterator[None]:
    """A command that goes on when its limit is met is killed."""
    from vmsandbox.guest.ssh import send_signal

    try:
        yield
    except LimitReachedError:
        send_signal(channel, "KILL")
        channel.close()
        raise


def ended_by_limit(folder: SessionFolder, info: SessionInfo) -> LimitReachedError | None:
    """The limit that has ended a session, if one has: read from its record."""
    record = folder.record_folder(info.id)
    try:
        entries = folder.journal(info.id).read()
    except JournalError:
        return None
    for entry in reversed(entries):
        if entry["kind"] == events.LimitReached.kind and entry["data"]["limit"] != "output":
            waits = f"what came back waits in quarantine: `vmsandbox accept {info.id}`"
            return LimitReachedError(
                entry["data"]["limit"], entry["data"]["value"], waits if (record / "quarantine").is_dir() else ""
            )
    return None
