"""Watches what guards a card for as long as its guest runs.

Rules that were in force at the start say nothing about the minute after: a firewall is reloaded, a bridge is changed.
The kernel tells of every change of its rules and links (netlink(7)); each is followed by a look of our own, and so is
every second, should a message be lost. While QEMU has no tap open (a snapshot is being taken) nothing can pass.
"""

from __future__ import annotations

import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from vmsandbox.errors import VmsandboxError
from vmsandbox.hypervisor.inforce import InForce, own_problems, problems, read_in_force, read_links
from vmsandbox.process import Programs
from vmsandbox.render.network import CardPlan

_NETLINK_ROUTE, _NETLINK_NETFILTER = 0, 12
_LINK_CHANGES, _RULE_CHANGES = 1 << 0, 1 << 6  # RTMGRP_LINK; NFNLGRP_NFTABLES is group 7
_EVERY = 1.0  # seconds between looks at the links
_RULES_EVERY = 5  # … and at the rules, as often, when the kernel has told of nothing
_PAUSE = 0.25  # a change comes in many messages; one look answers them all
# A libvirtd that is restarted makes its filters anew. Ours hold meanwhile, so that need not stop the guest.
_LIBVIRTS_TIME = 3.0
_MESSAGES = 4096  # forgotten at once, so that a flood of them does not keep us from looking


class CardWatch:
    """A thread that calls `on_gone` once, with the reason, when a card is not guarded any more, and then ends.

    Args:
        first: what was in force when the card was verified.
        is_alive: whether the guest still runs; one that has ended takes its tap along, which is no alarm.
        is_away: whether the guest has no card now, as while a snapshot is taken: nothing passes, so nothing is wrong.
        on_gone: called from the watch's thread. The guest must be stopped there, and fast.
    """

    def __init__(
        self,
        plan: CardPlan,
        first: InForce,
        programs: Programs,
        is_alive: Callable[[], bool],
        is_away: Callable[[], bool],
        on_gone: Callable[[str], None],
    ) -> None:
        self._plan = plan
        self._first = first
        self._programs = programs
        self._is_alive = is_alive
        self._is_away = is_away
        self._on_gone = on_gone
        self._ours, self._stop = socket.socketpair()
        self._ready, self._closed = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="card-watch", daemon=True)
        self._thread.start()
        self._ready.wait(5)

    def close(self) -> None:
        """End the watch; a second time does nothing."""
        self._closed.set()
        self._stop.close()
        if self._thread is not threading.current_thread():
            self._thread.join(5)

    def _run(self) -> None:
        try:
            with _changes() as told:
                reason = self._wait_for_trouble(told)
        except Exception as error:  # a watch that fails is no watch: the guest must not run without
            reason = f"the watch failed: {type(error).__name__}: {error}"
        finally:
            self._ready.set()
        if reason:
            self._on_gone(reason)

    def _wait_for_trouble(self, told: list[socket.socket]) -> str:
        """The reason; empty when the watch was closed, or the guest has ended."""
        quiet = 0
        since: float | None = None  # when libvirt's part of it was first seen to be wrong
        while True:
            was_away = self._is_away()
            wrong, urgent = self._look(rules=since is not None or quiet % _RULES_EVERY == 0)
            if was_away or (wrong and self._is_away()):  # it came, or went, while we looked
                wrong = ""
            since = None if not wrong else since or time.monotonic()
            if since is not None and (urgent or time.monotonic() - since > _LIBVIRTS_TIME):
                return wrong if self._is_alive() else ""
            self._ready.set()
            ready = select.select([self._ours, *told], [], [], _EVERY if since is None else _PAUSE)[0]
            if self._ours in ready:
                return ""
            quiet = 0 if ready else quiet + 1
            if ready:
                self._closed.wait(_PAUSE)
                _drain(told)

    def _read(self) -> InForce:
        try:
            return read_in_force(self._plan, self._programs)
        except (VmsandboxError, ValueError):  # a host that is short of processes for a moment
            self._closed.wait(_PAUSE)
            return read_in_force(self._plan, self._programs)

    def _look(self, *, rules: bool) -> tuple[str, bool]:
        """What is wrong, in words, and whether the guest must be stopped at once."""
        try:
            seen = self._read() if rules else InForce(self._first.tables, read_links(self._plan))
        except (VmsandboxError, ValueError) as error:
            return f"the rules in force cannot be read: {error}", True
        wrong = problems(seen, self._plan)
        if not wrong and seen.tables != self._first.tables:
            wrong = ["libvirt's rules for the card have changed"]
        return "; ".join(wrong), bool(own_problems(seen, self._plan))


@contextmanager
def _changes() -> Iterator[list[socket.socket]]:
    """Sockets on which the kernel tells of changes to rules and links."""
    with ExitStack() as stack:
        sockets = []
        for protocol, groups in ((_NETLINK_ROUTE, _LINK_CHANGES), (_NETLINK_NETFILTER, _RULE_CHANGES)):
            sock = stack.enter_context(socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, protocol))
            sock.bind((0, groups))
            sock.setblocking(False)
            sockets.append(sock)
        yield sockets


def _drain(sockets: list[socket.socket]) -> None:
    """Forget what was told; we look for ourselves."""
    for sock in sockets:
        for _ in range(_MESSAGES):
            try:
                sock.recv(1 << 16)
            except BlockingIOError:
                break
            except OSError:  # ENOBUFS: more was told than there was room for
                continue


def guest_runs(uuid: str, pid_file: Path) -> bool:
    """Whether the QEMU process of a session runs: its UUID is on the command line."""
    with suppress(OSError, ValueError):
        pid = int(pid_file.read_text())
        return uuid.encode() in Path(f"/proc/{pid}/cmdline").read_bytes()
    return False
