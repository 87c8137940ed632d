"""The process that keeps the network of a guest which outlives its command: started here, and ended.

`vmsandbox start` returns, and somebody must hold the SSH connection that leads to the broker. The keeper does, until
its guest is gone or `stop` ends it. It gets everything through a pipe (secrets are in no file and no argument) and
does nothing before its session has an identity: if the command that started it dies first, it ends.
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING

from vmsandbox.errors import GuestError, HostError
from vmsandbox.process import Programs
from vmsandbox.session.folder import SessionFolder, process_started

if TYPE_CHECKING:
    from vmsandbox.session.egress import EgressPlan

# The code of this very installation, found first; everything else as for the program itself.
_START = "import sys; sys.path.insert(0, sys.argv[1]); from vmsandbox.session.egress_keeper import main; main()"
GO, FORWARDS = b"go\n", b"forwards\n"
END_SECONDS = 8.0
_PASSED = ("VMSANDBOX_LIBVIRT_URI", "SSL_CERT_FILE")


@dataclass
class Keeper:
    """A keeper that was just started, seen from the command that started it."""

    folder: SessionFolder
    pid: int
    to: IO[bytes]
    said: IO[bytes]

    def go(self) -> None:
        """Tell it that the guest takes logins now."""
        with suppress(OSError):
            self.to.write(GO)
            self.to.close()

    def wait_until_it_forwards(self, seconds: float) -> None:
        """Raises GuestError if the guest does not reach its broker within `seconds`."""
        until = time.monotonic() + seconds
        untrusted = b""
        while not untrusted.endswith(b"\n"):
            ready, _, _ = select.select([self.said], [], [], max(until - time.monotonic(), 0))
            piece = os.read(self.said.fileno(), 100) if ready else b""
            if not piece:
                break
            untrusted += piece
        self.said.close()
        if untrusted != FORWARDS:
            raise GuestError(
                "the guest's network did not come up",
                details=log_tail(self.folder) or f"nothing within {seconds:g} seconds",
                resolution="`vmsandbox doctor` says whether the broker's environment is there",
            )


def start_keeper(folder: SessionFolder, plan: EgressPlan, environment: Path, programs: Programs) -> Keeper:
    """Start the keeper of a session whose folder is claimed; the broker starts at once, the login waits for `go`.

    Raises:
        HostError: it cannot be started.
    """
    from vmsandbox.egress.wire import config_to_json

    package = Path(__file__).resolve().parents[2]
    passed = {name: os.environ[name] for name in _PASSED if name in os.environ}
    argv: list[str | Path] = [sys.executable, "-I", "-c", _START, package, f"the network of {folder.path}"]
    pid, to, said = programs.detached(argv, log=folder.keeper_log, env=passed)
    told = {
        "layout": {name: str(path) for name, path in asdict(folder.layout).items()},
        "name": folder.name,
        "mode": plan.mode.value,
        "config": config_to_json(plan.config).decode(),
        "environment": str(environment),
    }
    try:
        (folder.path / "keeper.json").write_text(json.dumps({"pid": pid, "started": process_started(pid) or 0}))
        view = memoryview(json.dumps(told).encode() + b"\n")
        while view:
            view = view[to.write(view) :]
    except OSError as error:
        to.close()  # it ends at the end of its input
        raise HostError("the keeper of the guest's network did not start", details=str(error)) from error
    return Keeper(folder, pid, to, said)


def log_tail(folder: SessionFolder) -> str:
    """The end of what a keeper had to say."""
    with suppress(OSError):
        return folder.keeper_log.read_bytes()[-2000:].decode("utf-8", "replace").strip()
    return ""


def keeper_is_alive(folder: SessionFolder) -> bool | None:
    """Whether the session's keeper runs; None if it has none."""
    recorded = _recorded(folder)
    return None if recorded is None else process_started(recorded[0]) == recorded[1]


def end_keeper(folder: SessionFolder) -> None:
    """End a session's keeper, and wait for it: it writes the totals down. None, or one that is gone, is no error.

    Raises:
        HostError: it does not end.
    """
    recorded = _recorded(folder)
    if recorded is None:
        return
    pid, started = recorded
    try:
        descriptor = os.pidfd_open(pid)
    except OSError:
        return
    try:
        # Looked at after the descriptor is held: the number cannot mean another process from here on.
        if process_started(pid) != started:
            return
        poller = select.poll()
        poller.register(descriptor, select.POLLIN)
        for number, seconds in ((signal.SIGTERM, END_SECONDS), (signal.SIGKILL, 5.0)):
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(descriptor, number)
            if poller.poll(seconds * 1000):
                return
    finally:
        os.close(descriptor)
    raise HostError(f"process {pid}, which kept the guest's network, does not end")


def _recorded(folder: SessionFolder) -> tuple[int, int] | None:
    with suppress(OSError, ValueError, KeyError, TypeError):
        recorded = json.loads((folder.path / "keeper.json").read_text())
        return int(recorded["pid"]), int(recorded["started"])
    return None
