"""The end of a session: every step is tried, whatever the ones before it did.

QEMU is ended by its process descriptor and not through libvirt: the guest is gone in milliseconds, and libvirt,
which sees its monitor close, cleans up by itself (where PID 1 reaps late it would hold the person for seconds).
"""

from __future__ import annotations

import os
import secrets
import select
import shutil
import signal
from collections.abc import Callable
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path

from vmsandbox.errors import VmsandboxError
from vmsandbox.failpoints import failpoint
from vmsandbox.hypervisor.lost import end_lost, remove_groups
from vmsandbox.ledger.book import Ledger
from vmsandbox.ledger.processes import Process
from vmsandbox.paths import Layout
from vmsandbox.session.network.keeper import end_keeper
from vmsandbox.session.state.folder import SessionFolder
from vmsandbox.session.state.guestlock import guest_locked
from vmsandbox.session.state.info import SessionInfo
from vmsandbox.session.upkeep.watching import end_watcher

_END_DEADLINE_MS = 10_000
_ROLLBACK_SECONDS = 20.0  # that the end of a session waits for one; a killed one holds nothing
_INTERRUPTIONS = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}


def tear_down(layout: Layout, folder: SessionFolder, info: SessionInfo) -> list[str]:
    """End a session's guest and remove its folders; returns what is left, in words (empty: nothing).

    Safe to call twice, and for a session that never got further than its claim. A second Ctrl-C waits until it
    is done. The folder itself goes last, so that what could not be removed can be found again.
    """
    with ExitStack() as alone:
        if folder.is_between_guests:  # one that is being rolled back has its new guest first; then that one ends
            with suppress(VmsandboxError, OSError):
                alone.enter_context(guest_locked(folder, patience=_ROLLBACK_SECONDS))
        return _tear_down(layout, folder, info)


def _tear_down(layout: Layout, folder: SessionFolder, info: SessionInfo) -> list[str]:
    left: list[str] = []
    if _is_anothers(folder, info):
        return left
    with suppress(VmsandboxError):
        info = folder.info()  # whose guest may have been exchanged since

    def attempt(what: str, step: Callable[[], None]) -> None:
        try:
            step()
            failpoint(f"destroy.{what.replace(' ', '-')}")
        except (VmsandboxError, OSError) as error:
            left.append(f"{what}: {error}")

    before = signal.pthread_sigmask(signal.SIG_BLOCK, _INTERRUPTIONS)
    try:
        attempt("watcher", lambda: end_watcher(folder))
        if _is_anothers(folder, info):
            return left  # the watcher was ending it, and somebody has used the name again since
        attempt("network", lambda: end_keeper(folder))
        for another in _halfway(folder, info):
            attempt("guest of a rollback", partial(end_guest, folder, another))
            attempt("files of a rollback", partial(remove_guest_files, folder, another))
        attempt("guest", lambda: end_guest(folder, info))
        attempt("network card", lambda: _remove_card(folder, info))
        attempt("broker socket", lambda: _remove(folder.net))
        attempt("guest files", lambda: remove_guest_files(folder, info))
        if not left:
            attempt("session folder", lambda: _remove_claim(folder, info))
        if not left:
            Ledger.of(layout).forget(info.id)  # last: until here, what is left can be found
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return left


def _is_anothers(folder: SessionFolder, info: SessionInfo) -> bool:
    """Whether the name belongs to another session by now."""
    with suppress(VmsandboxError):
        return folder.info().id != info.id
    return False


def _halfway(folder: SessionFolder, info: SessionInfo) -> list[SessionInfo]:
    """The other guest, where a rollback was broken off."""
    with suppress(VmsandboxError):
        if (halfway := folder.halfway()) is not None:
            return [one for one in (halfway.before, halfway.coming) if one.uuid != info.uuid]
    return []


def remove_guest_files(folder: SessionFolder, info: SessionInfo) -> None:
    """Remove what is one guest's own: sockets, QEMU's files, its number. Raises OSError."""
    for path in (folder.sockets(info), folder.vm(info), folder.pid_file(info)):
        _remove(path)


def end_guest(folder: SessionFolder, info: SessionInfo) -> None:
    """End the QEMU process of a session; by libvirt if its process is not known, and by its UUID if it is not to it.

    Raises:
        HostError: neither way worked.
    """
    if _kill_process(folder, info):
        remove_groups(info.uuid)  # libvirt does it, too, if it is there
        return
    from vmsandbox.hypervisor.connection import Host

    host = Host.open()
    try:
        host.destroy(info.uuid)
    finally:
        host.close()
    # A libvirtd that was killed while it started the guest, or whose /run was lost, knows nothing of it.
    end_lost(info.uuid)


def remove_damaged(layout: Layout, name: str) -> list[str]:
    """Remove a session whose record cannot be read; its guest is found by the home in its metadata and its name."""
    from vmsandbox.hypervisor.connection import Host
    from vmsandbox.hypervisor.fork import DOMAIN_PREFIX
    from vmsandbox.render.domain import METADATA_NS

    folder = SessionFolder(layout, name)
    left: list[str] = []
    host = Host.open()
    try:
        end_watcher(folder)
        end_keeper(folder)
        for domain in host.list_sessions(METADATA_NS):
            # a domain's name is "vmsandbox-<session>-<six hexadecimal digits>"
            if domain.home == str(layout.live) and domain.name[len(DOMAIN_PREFIX) : -7] == name:
                host.destroy(domain.uuid)
        for path in (*folder.all_sockets(), folder.net, folder.path):
            _remove(path)
    except (VmsandboxError, OSError) as error:
        left.append(str(error))
    finally:
        host.close()
    return left


def _remove_card(folder: SessionFolder, info: SessionInfo) -> None:
    if (folder.path / "card.json").exists():  # else its imports would cost every session's end
        from vmsandbox.session.network.filtered import remove_card

        remove_card(folder, info)


def _kill_process(folder: SessionFolder, info: SessionInfo) -> bool:
    """True if the session's own QEMU process was there and is gone. Its UUID must be on its command line."""
    with suppress(OSError, ValueError):
        pid = folder.qemu_pid(info)
        descriptor = os.pidfd_open(pid)
        try:
            # Looked at after the descriptor is held: the number cannot mean another process from here on.
            if info.uuid.encode() not in Path(f"/proc/{pid}/cmdline").read_bytes():
                return False
            signal.pidfd_send_signal(descriptor, signal.SIGKILL)
            poller = select.poll()
            poller.register(descriptor, select.POLLIN)
            return bool(poller.poll(_END_DEADLINE_MS))
        finally:
            os.close(descriptor)
    return False


def _remove_claim(folder: SessionFolder, info: SessionInfo) -> None:
    """Give the name back in one step. From then on it may be another session's, whose folder must not be touched."""
    me = Process.here()
    going = folder.path.with_name(f".{folder.name}.{me.pid}.{me.started}.{secrets.token_hex(4)}")
    try:
        folder.path.rename(going)
    except FileNotFoundError:
        return
    failpoint("destroy.name-given-back")
    if not info.is_recorded_in(going):
        going.rename(folder.path)
        return
    _remove(going)


def _remove(path: Path) -> None:
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        path.unlink()
    elif path.exists():
        # Another one may be at it (`gc`, `stop`): what has gone meanwhile is no error.
        shutil.rmtree(path, onerror=_unless_gone)


def _unless_gone(_function: object, _path: str, raised: tuple[type, BaseException, object]) -> None:
    if not isinstance(raised[1], FileNotFoundError):
        raise raised[1]
