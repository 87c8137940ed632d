"""What the watcher's process does (see `upkeep.watching`): ends one session at its limits, runs its health check.

The session is known by its id and its guest by its UUID, looked at each time: a name that is used again is another
session. What the guest made of the project is fetched first, so that an end by a limit loses no work.
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import threading
import time
import traceback
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

from vmsandbox.errors import UserInputError, VmsandboxError
from vmsandbox.journal import events
from vmsandbox.monitor import Monitor
from vmsandbox.paths import Layout
from vmsandbox.policy.values import Healthcheck
from vmsandbox.session.live.ending import end_session
from vmsandbox.session.live.teardown import end_guest
from vmsandbox.session.state.activity import activity_file
from vmsandbox.session.state.folder import SessionFolder, guests_of
from vmsandbox.session.state.info import SessionInfo
from vmsandbox.session.upkeep.balloon import Balloon
from vmsandbox.session.upkeep.freezing import is_frozen
from vmsandbox.session.upkeep.health import Health
from vmsandbox.session.upkeep.watching import COLLECT_SECONDS

_LOOK = 1.0  # seconds between two looks, at most


class _Log(Monitor):
    """Warnings onto stderr, which is the log file."""

    def warning(self, text: str) -> None:
        print(f"{time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())} {text}", file=sys.stderr, flush=True)


def main() -> None:
    """Read what to watch from stdin, and watch it."""
    ending = os.eventfd(0, os.EFD_CLOEXEC)

    def end(_number: int, _frame: FrameType | None) -> None:
        os.eventfd_write(ending, 1)

    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # the terminal's hangup
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, end)
    line = sys.stdin.buffer.readline()
    if not line.endswith(b"\n"):
        return  # who started us has gone
    try:
        _Watch(json.loads(line), ending).run()
    except Exception:
        _Log().warning(traceback.format_exc())
        sys.exit(1)


class _Watch:
    def __init__(self, told: dict[str, Any], ending: int) -> None:
        self._layout = Layout(**{name: Path(path) for name, path in told["layout"].items()})
        self._folder = SessionFolder(self._layout, told["name"])
        self._id = str(told["id"])
        self._time: float | None = told["time"]
        self._idle: float | None = told["idle"]
        self._check = Healthcheck(tuple(told["health"][0]), *told["health"][1:]) if told["health"] else None
        self._reserved: int | None = told["reserved"]
        self._ending = ending

    def run(self) -> None:
        """Until the guest is gone, someone asks for the end, or a limit is met."""
        info = self._info()
        if info is None:
            return
        health = Health(self._folder, self._id, self._check) if self._check else None
        if health is not None:
            health.start()
        try:
            limit = self._wait(info)
        finally:
            if health is not None:
                health.end()
        if limit is not None and (now := self._info()) is not None:
            self._end(now, limit)

    def _info(self) -> SessionInfo | None:
        """The session's record, if it is still this session."""
        with suppress(VmsandboxError):
            info = self._folder.info()
            return info if info.id == self._id else None
        return None

    def _wait(self, info: SessionInfo) -> str | None:
        """The limit that was met; None if the session has ended by itself, or is being ended."""
        self._began = self._active = time.monotonic()
        self._last_note = self._noted()
        for qemu in guests_of(self._folder, info):
            now = self._info()
            if now is None or not self._folder.guest_is_alive(now):
                return None
            balloon = Balloon(now.uuid, now.memory_mib, self._reserved) if self._reserved else None
            poller = select.poll()
            poller.register(qemu, select.POLLIN)
            poller.register(self._ending, select.POLLIN)
            while not (ended := poller.poll(self._pause())):
                if balloon is not None:
                    balloon.look()
                if limit := self._met():
                    return limit
            if any(descriptor == self._ending for descriptor, _ in ended):
                return None
        return None

    def _met(self) -> str | None:
        """The limit that is met now."""
        now = time.monotonic()
        # By the change and not by the clock, which may be set.
        if (latest := self._noted()) != self._last_note:
            self._last_note, self._active = latest, now
        if is_frozen(self._folder):
            self._active = now  # a person looks into it: nothing ends before it is thawed
        elif self._time is not None and now - self._began >= self._time:
            return "time"
        elif self._idle is not None and now - self._active >= self._idle:
            return "idle"
        return None

    def _pause(self) -> float | None:
        """Milliseconds until the next look; None: there is nothing to look at."""
        limits = [limit / 10 for limit in (self._time, self._idle) if limit is not None]
        return 1000 * min(_LOOK, *limits) if limits else 1000 * _LOOK if self._reserved else None

    def _noted(self) -> int | None:
        with suppress(OSError):
            return activity_file(self._folder).stat().st_mtime_ns
        return None

    def _end(self, info: SessionInfo, limit: str) -> None:
        # From here on the end is this process's: who asks for it now waits (`end_watcher`).
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        journal = self._folder.journal(self._id)
        value = self._time if limit == "time" else self._idle
        # Nothing keeps the end from coming: no full disk, no guest whose answers nobody thought of.
        try:
            journal.append(events.LimitReached(limit, value or 0))
        except VmsandboxError as error:
            _Log().warning(f"the limit ({limit}) could not be written down: {error}")
        try:
            self._collect(info)
        except Exception:
            _Log().warning(traceback.format_exc())
        now = self._info()
        if now is None:
            return
        if now.owner_is_alive:
            end_guest(self._folder, now)  # the rest is its owner's, who waits for the guest and hears of it so
            return
        end_session(self._layout, self._folder, now, f"ended by its limit: {limit}")

    def _collect(self, info: SessionInfo) -> None:
        """Fetch what changed into the record's quarantine, while that takes no longer than it may."""
        if info.guest_folder is None or not info.ready:
            return
        from vmsandbox.session.sandbox import Sandbox

        log = _Log()
        late = threading.Timer(COLLECT_SECONDS, end_guest, (self._folder, info))
        late.daemon = True
        late.start()
        until = time.monotonic() + COLLECT_SECONDS
        sandbox = Sandbox(self._layout, self._folder, info, log)
        try:
            while True:
                try:
                    sandbox.collect()
                    return
                except UserInputError:  # somebody else is at it
                    if time.monotonic() > until:
                        raise
                    time.sleep(1)
        except (VmsandboxError, OSError) as error:
            brief = f"what the guest made of the project could not be fetched before its end: {error}"
            log.warning(brief)
            with suppress(VmsandboxError):
                sandbox.journal.append(events.SessionFailed(brief, getattr(error, "details", "")))
        finally:
            late.cancel()
            sandbox.hang_up()
