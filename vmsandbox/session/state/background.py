"""Processes of a session that outlive the command which started them: started here, found again, and ended.

Each is written down in the session's folder before it is told what to do, gets everything through a pipe (secrets are
in no file and no argument), and is known by its number and start time: a number that is used again harms nobody.
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from vmsandbox.errors import HostError, VmsandboxError
from vmsandbox.ledger.book import Kind, Ledger
from vmsandbox.ledger.processes import Process, process_started
from vmsandbox.process import Programs
from vmsandbox.session.state.folder import SessionFolder

END_SECONDS = 8.0
# The code of this very installation, found first; everything else as for the program itself.
_START = "import sys; sys.path.insert(0, sys.argv[1]); from vmsandbox.session.{} import main; main()"
_PASSED = ("VMSANDBOX_LIBVIRT_URI", "SSL_CERT_FILE")


def start_background(
    folder: SessionFolder, kind: str, module: str, told: dict[str, Any], programs: Programs
) -> tuple[int, IO[bytes], IO[bytes]]:
    """Start `vmsandbox.session.<module>.main` for a session whose folder is claimed; its pid, and its two pipes.

    Args:
        kind: its record is `<kind>.json`, its stderr `<kind>.log`.
        told: the first line on its stdin, as JSON, with `layout` and `name` added. Without one it ends.

    Raises:
        HostError: it cannot be started.
    """
    package = Path(__file__).resolve().parents[3]
    passed = {name: os.environ[name] for name in _PASSED if name in os.environ}
    argv: list[str | Path] = [sys.executable, "-I", "-c", _START.format(module), package, f"{kind} of {folder.path}"]
    pid, to, said = programs.detached(argv, log=folder.path / f"{kind}.log", env=passed)
    layout = {name: str(path) for name, path in asdict(folder.layout).items()}
    try:
        record = json.dumps({"pid": pid, "started": process_started(pid) or 0})
        (folder.path / f"{kind}.json").write_text(record)
        Ledger.of(folder.layout).plan(folder.info().id, (Kind.PROCESS, f"{Process.of(pid)} {kind}"))
        view = memoryview(json.dumps({**told, "layout": layout, "name": folder.name}).encode() + b"\n")
        while view:
            view = view[to.write(view) :]
    except OSError as error:
        to.close()  # it ends at the end of its input
        raise HostError(f"the session's {kind} did not start", details=str(error)) from error
    except VmsandboxError:
        to.close()
        raise
    return pid, to, said


def background_is_alive(folder: SessionFolder, kind: str) -> bool | None:
    """Whether the session's process of this kind runs; None if it has none."""
    recorded = _recorded(folder, kind)
    return None if recorded is None else process_started(recorded[0]) == recorded[1]


def end_background(folder: SessionFolder, kind: str, patience: float = END_SECONDS) -> None:
    """End a session's process, and wait for it. None, one that is gone, or this process itself, is no error.

    patience: seconds until it is killed.

    Raises:
        HostError: it does not end.
    """
    recorded = _recorded(folder, kind)
    if recorded is None or recorded[0] == os.getpid():
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
        for number, seconds in ((signal.SIGTERM, patience), (signal.SIGKILL, 5.0)):
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(descriptor, number)
            if poller.poll(seconds * 1000):
                return
    finally:
        os.close(descriptor)
    raise HostError(f"process {pid}, the session's {kind}, does not end")


def _recorded(folder: SessionFolder, kind: str) -> tuple[int, int] | None:
    with suppress(OSError, ValueError, KeyError, TypeError):
        recorded = json.loads((folder.path / f"{kind}.json").read_text())
        return int(recorded["pid"]), int(recorded["started"])
    return None
