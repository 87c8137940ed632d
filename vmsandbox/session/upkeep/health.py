"""Runs a guest's health check at its interval, on a connection of its own, and writes down what changes.

Its output is untrusted and bounded; a check that hangs is cut at its timeout; a guest whose checks fail for ever does
not fill the journal.
"""

from __future__ import annotations

import json
import threading
import time
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, Any

from vmsandbox.errors import VmsandboxError
from vmsandbox.guest.control import connect_ssh
from vmsandbox.journal import events
from vmsandbox.policy.values import Healthcheck
from vmsandbox.review.text import shown_bytes
from vmsandbox.session.state.folder import SessionFolder
from vmsandbox.session.upkeep.freezing import is_frozen
from vmsandbox.spec import WORKER

if TYPE_CHECKING:
    from vmsandbox.guest.ssh import GuestShell

STARTING, HEALTHY, UNHEALTHY = "starting", "healthy", "unhealthy"
_LOGIN_SECONDS = 30.0
_KEPT_BYTES = 500
_MOST_EVENTS = 1000  # of one session: a guest that changes to and fro writes no more


class Health(threading.Thread):
    """The health check of one session, until `end`."""

    def __init__(self, folder: SessionFolder, session_id: str, check: Healthcheck) -> None:
        super().__init__(daemon=True, name="health")
        self._folder = folder
        self._check = check
        self._journal = folder.journal(session_id)
        self._connection = ExitStack()
        self._shell: GuestShell | None = None
        self._ending = threading.Event()
        self._failures = 0
        self._state = STARTING
        self._events = 0
        self._write(STARTING)

    def end(self) -> None:
        """Begin no further run, and give the port back."""
        self._ending.set()
        self._connection.close()

    def run(self) -> None:
        """Check again and again."""
        while not self._ending.wait(self._check.interval):
            if is_frozen(self._folder):
                continue
            began = time.monotonic()
            try:
                status, untrusted = self._test()
            except (VmsandboxError, OSError) as error:
                status, untrusted = None, str(error).encode()
                self._connection.close()
                self._shell = None
            if not self._ending.is_set():
                self._take(status, time.monotonic() - began, untrusted)

    def _take(self, status: int | None, seconds: float, untrusted: bytes) -> None:
        before, failures = self._state, self._failures
        self._failures = 0 if status == 0 else failures + 1
        if status == 0:
            self._state = HEALTHY
        elif self._failures >= self._check.retries:
            self._state = UNHEALTHY
        if status != 0 and before != UNHEALTHY:
            output = shown_bytes(untrusted, _KEPT_BYTES)
            self._note(events.HealthcheckFailed(self._failures, status, round(seconds, 3), output))
        if self._state != before:
            self._note(events.HealthChanged(self._state, failures if status == 0 else self._failures))
            self._write(self._state)

    def _test(self) -> tuple[int | None, bytes]:
        """Run it once: (status, None if it was cut off; the end of its output)."""
        from vmsandbox.guest.ssh import send_signal

        until = time.monotonic() + self._check.timeout
        channel = self._login().start(self._check.test, cwd=self._folder.info().guest_folder)
        untrusted = bytearray()
        try:
            channel.shutdown_write()
            while not (channel.exit_status_ready() or channel.closed):
                if time.monotonic() > until or self._ending.is_set():
                    send_signal(channel, "KILL")
                    return None, bytes(untrusted)
                untrusted += _read(channel)
                del untrusted[:-_KEPT_BYTES]
            untrusted += _read(channel)
            return channel.recv_exit_status(), bytes(untrusted[-_KEPT_BYTES:])
        finally:
            channel.close()

    def _login(self) -> GuestShell:
        from vmsandbox.guest.ssh import GuestShell

        if self._shell is None or not self._shell.is_open:
            self._connection.close()
            keys = self._folder.keys()
            port = self._connection.enter_context(self._folder.ssh_port(self._folder.info().ssh_ports))
            sock = connect_ssh(self._folder.ssh_socket(port), _LOGIN_SECONDS)
            self._shell = GuestShell.connect(
                sock, user=WORKER, host_key=keys.host_key, user_key=keys.user_key, deadline=_LOGIN_SECONDS
            )
            self._connection.callback(self._shell.leave)
        return self._shell

    def _note(self, event: events.Event) -> None:
        self._events += 1
        if self._events <= _MOST_EVENTS:
            with suppress(VmsandboxError):
                self._journal.append(event)

    def _write(self, state: str) -> None:
        path = self._folder.path / "health.json"
        fresh = path.with_name(".health.json")
        with suppress(OSError):
            fresh.write_text(json.dumps({"state": state, "failures": self._failures}))
            fresh.rename(path)


def _read(channel: Any) -> bytes:
    """What is there now, or within a twentieth of a second; in pieces, so that a flood is cut at the timeout, too."""
    from vmsandbox.guest.streams import wait_readable

    if not (channel.recv_ready() or channel.recv_stderr_ready()):
        wait_readable(channel, 0.05)
    untrusted = b""
    if channel.recv_ready():
        untrusted += channel.recv(1 << 16)
    if channel.recv_stderr_ready():
        untrusted += channel.recv_stderr(1 << 16)
    return untrusted
