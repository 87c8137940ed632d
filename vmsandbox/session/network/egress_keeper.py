"""What the keeper's process does (see `session.network.keeper`): holds a guest's network until the guest is gone.

The network ends with this process, whatever ends it: the broker is its child, the forwarded port its connection's.
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
from contextlib import ExitStack, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from vmsandbox.egress.wire import config_from_json
from vmsandbox.errors import VmsandboxError
from vmsandbox.guest.control import connect_ssh
from vmsandbox.monitor import Monitor
from vmsandbox.paths import Layout
from vmsandbox.process import Programs
from vmsandbox.session.network.egress import Egress, EgressPlan
from vmsandbox.session.network.filtered import Card, reopen_card
from vmsandbox.session.network.keeper import FORWARDS, GO
from vmsandbox.session.state.folder import SessionFolder, guests_of
from vmsandbox.session.state.info import SessionInfo
from vmsandbox.spec import WORKER, NetworkMode

LOGIN_DEADLINE = 30.0
_LOOK = 0.5  # seconds between two looks at the connection
_PATIENCE = 5.0  # seconds between two logins that failed
_LOG_BYTES = 256 << 10


class _Log(Monitor):
    """Warnings onto stderr, which is the log file, as long as there is room."""

    def __init__(self) -> None:
        self._left = _LOG_BYTES

    def warning(self, text: str) -> None:
        line = f"{time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())} {text}\n"
        self._left -= len(line)
        if self._left > 0:
            sys.stderr.write(line)
            sys.stderr.flush()

    notice = warning


def main() -> None:
    """Read what to keep from stdin, and keep it."""
    log = _Log()
    threading.excepthook = lambda hook: log.warning(f"{hook.exc_type.__name__}: {hook.exc_value}")
    ending = os.eventfd(0, os.EFD_CLOEXEC)

    def end(_number: int, _frame: FrameType | None) -> None:
        os.eventfd_write(ending, 1)

    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # the terminal's hangup
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, end)
    try:
        told = json.loads(sys.stdin.buffer.readline())
        _keep(told, ending, log)
    except VmsandboxError as error:
        log.warning(f"{error.brief}\n{error.details}")
        sys.exit(1)
    except Exception:
        log.warning(traceback.format_exc())
        sys.exit(1)


def _keep(told: dict[str, Any], ending: int, log: _Log) -> None:
    layout = Layout(**{name: Path(path) for name, path in told["layout"].items()})
    folder = SessionFolder(layout, told["name"])
    info = folder.info()
    plan = EgressPlan(NetworkMode(told["mode"]), config_from_json(told["config"].encode()), {}, {})
    egress = Egress(folder, info, plan, log)
    card = reopen_card(folder, info, Programs()) if plan.mode is NetworkMode.FILTERED else None
    try:
        egress.start(Path(told["environment"]), Programs(), card.listeners() if card else None)
        if sys.stdin.buffer.readline() == GO:
            os.close(0)
            os.open(os.devnull, os.O_RDONLY)
            if card is None:
                _forward(folder, info, egress, ending, log)
            else:
                egress.watch(card)
                _tell(FORWARDS)
                _outlast(folder, info, card, ending)
    finally:
        egress.close()
        if card is not None:
            card.close()


def _outlast(folder: SessionFolder, info: SessionInfo, card: Card, ending: int) -> None:
    """Until the guest is gone or someone asks for the end: a card is watched also when its broker has ended."""
    watched = info
    for qemu in guests_of(folder, info):
        now = watched
        with suppress(VmsandboxError):
            now = folder.info()
        if now.uuid != watched.uuid:  # rolled back
            card.follow(now)
            watched = now
        while not _any(_LOOK, qemu, ending):
            pass
        if _any(0, ending):
            return


def _forward(folder: SessionFolder, info: SessionInfo, egress: Egress, ending: int, log: _Log) -> None:
    """Until the guest is gone, the broker is, or someone asks for the end; a connection that breaks is made again."""
    told = False
    for qemu in guests_of(folder, info):
        while egress.alive and not _any(0, qemu, ending):
            with ExitStack() as connection:
                try:
                    shell = _login(folder, connection)
                    egress.forward(shell)
                    shell.wait_for_port()
                except VmsandboxError as error:
                    log.warning(f"{error.brief}: {error.details}")
                    _any(_PATIENCE, qemu, ending)
                    continue
                began = time.monotonic()
                if not told:
                    told = True
                    _tell(FORWARDS)
                while shell.is_open and egress.alive and not _any(_LOOK, qemu, ending):
                    pass
                if not shell.is_open:
                    log.warning("the connection to the guest broke: the keeper logs in again")
                    # A guest that hangs up at once must not keep this host busy with handshakes.
                    _any(_PATIENCE if time.monotonic() - began < _PATIENCE else 0, qemu, ending)
        if not egress.alive or _any(0, ending):
            return


def _login(folder: SessionFolder, connection: ExitStack) -> Any:
    from vmsandbox.guest.ssh import GuestShell

    keys = folder.keys()
    port = connection.enter_context(folder.ssh_port(folder.info().ssh_ports))
    sock = connect_ssh(folder.ssh_socket(port), LOGIN_DEADLINE)
    shell = GuestShell.connect(
        sock, user=WORKER, host_key=keys.host_key, user_key=keys.user_key, deadline=LOGIN_DEADLINE
    )
    connection.callback(shell.leave)
    return shell


def _tell(word: bytes) -> None:
    with suppress(OSError):
        os.write(1, word)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def _any(seconds: float, *descriptors: int) -> bool:
    """Whether one of these can be read (a process has ended, the end was asked for); waits at most `seconds`."""
    poller = select.poll()
    for descriptor in descriptors:
        poller.register(descriptor, select.POLLIN)
    return bool(poller.poll(seconds * 1000))
