"""Removes what crashed processes left behind, by identity and never by name or age alone.

A session is garbage when the process that had to end it is gone, or its guest is. A template or image in the making
is garbage when nobody holds its lock. What has lost the folder that it belonged to is found by the ledger; if that
cannot be read, nothing is removed that might be somebody's. Everything that is alive is left alone; running it twice,
also at once, is harmless.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from vmsandbox.errors import HostError, UserInputError, VmsandboxError
from vmsandbox.failpoints import failpoint
from vmsandbox.hypervisor.connection import Host
from vmsandbox.hypervisor.template import TemplateStore, making_lock
from vmsandbox.image.store import ImageStore
from vmsandbox.ledger.admission import drop_dead, someone_is_starting
from vmsandbox.ledger.book import Ledger, LedgerError, Row
from vmsandbox.ledger.processes import Process
from vmsandbox.paths import Layout
from vmsandbox.removal import GONE
from vmsandbox.render.domain import METADATA_NS
from vmsandbox.session.live.teardown import tear_down
from vmsandbox.session.records.unfinished import parts_in_records, unfinished_projects
from vmsandbox.session.resources.orphans import (
    Removed,
    applied_to,
    forget_applied,
    orphans,
    owned_guests,
    remove_orphan,
)
from vmsandbox.session.resources.quotas import make_room, remove_old_records
from vmsandbox.session.rewind.recovery import recovered_guests
from vmsandbox.session.state.folder import live_sessions
from vmsandbox.session.state.guestlock import guest_locked
from vmsandbox.session.upkeep.disk_watch import ENOUGH_ROOM, free_bytes, go_on

UNUSED_TEMPLATE_DAYS = 30
_LOCK = "gc.lock"


def collect_garbage(
    layout: Layout, host: Host, *, all_templates: bool = False, older_than: float | None = None
) -> list[Removed]:
    """Remove leftovers; returns what was done.

    all_templates: also remove every template that no live session uses. older_than: also the records of sessions that
    ended so many days ago.
    """
    with _alone(layout):
        ledger = Ledger.of(layout)
        rows: list[Row] | None = None
        removed: list[Removed] = []
        with suppress(LedgerError):
            rows = ledger.rows()
        removed += _dead_sessions(layout, rows or [])
        removed += [Removed("guest", *one) for one in recovered_guests(layout)]
        failpoint("gc.sessions")
        try:
            rows = ledger.rows()
            removed += _by_the_ledger(layout, host, ledger, rows)
        except LedgerError as error:
            why = "guests, networks and sockets without a session stay: they might be somebody's"
            removed.append(Removed("ledger", str(ledger.path), why, f"{error.brief}: {error.details}"))
        failpoint("gc.ledger")
        removed += unfinished_templates(layout)
        removed += unused_templates(layout, all_templates)
        removed += [
            Removed("image", path.name, "its build was interrupted") for path in ImageStore(layout).prune_building()
        ]
        removed += [Removed("record", *part) for part in parts_in_records(layout)]
        applied = applied_to(rows or [])
        removed += [Removed("project", *part) for part in unfinished_projects(layout, applied)]
        forget_applied(layout, applied)
        if older_than is not None:
            removed += remove_old_records(layout, older_than)
        removed += make_room(layout)
        removed += _paused_guests(layout)
        failpoint("gc.done")
    return removed


@contextmanager
def _alone(layout: Layout) -> Iterator[None]:
    """One `gc` of an installation at a time: the next one finds what the one before could not remove, and no more."""
    path = layout.ledger.with_name(_LOCK)
    try:
        path.parent.mkdir(mode=0o711, parents=True, exist_ok=True)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise HostError("nothing can be removed here", details=str(error)) from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _paused_guests(layout: Layout) -> Iterator[Removed]:
    """Let guests go on that were paused because the disk was full, where nobody watches over them."""
    for folder in live_sessions(layout):
        with suppress(VmsandboxError, OSError):
            if free_bytes(folder) >= ENOUGH_ROOM and go_on(folder, folder.info()):
                yield Removed("pause", folder.name, "the disk was full, and has room again: the guest goes on")


def _by_the_ledger(layout: Layout, host: Host, ledger: Ledger, rows: list[Row]) -> Iterator[Removed]:
    for orphan in orphans(layout, rows):
        yield from remove_orphan(layout, host, orphan)
    yield from _stray_domains(layout, host, ledger)
    yield from _stray_networks(layout, host)
    drop_dead(ledger)


def _dead_sessions(layout: Layout, rows: list[Row]) -> Iterator[Removed]:
    in_work = {row.session for row in rows if row.maker_is_alive}  # a rollback, between two guests
    for folder in live_sessions(layout):
        try:
            info = folder.info()
        except VmsandboxError as error:
            yield Removed("session", folder.name, "its record cannot be read", error.brief)
            continue
        if info.owner_is_alive or info.id in in_work:
            continue
        if info.owner_pid > 0:
            why = "the process that ran it is gone"
        elif not folder.guest_is_alive(info):
            why = "its guest is gone"
        else:
            continue
        try:
            with guest_locked(folder):  # else somebody makes it a new guest at this moment
                pass
        except UserInputError:
            continue
        except OSError:
            pass  # the folder cannot be written: what cannot be removed is told
        yield Removed("session", folder.name, why, "; ".join(tear_down(layout, folder, info)))
    for staged in layout.live.glob(".*"):  # a claim, or an end, that was interrupted
        if not _is_being_written(staged):
            shutil.rmtree(staged, ignore_errors=True)
            yield Removed("session", staged.name, "its claim was interrupted")


def _is_being_written(staged: Path) -> bool:
    """Whether the process whose claim (or end of a session) this is still runs: `.NAME.PID.START.xxxxxxxx`."""
    with suppress(ValueError, IndexError):
        _, _, pid, started, _ = staged.name.split(".")
        return Process.of(int(pid)).started == int(started) > 0
    return False


def _stray_domains(layout: Layout, host: Host, ledger: Ledger) -> Iterator[Removed]:
    """Guests of this installation whose folder is gone, or whose template nobody is making."""
    # The guests first: one that is started meanwhile has its folder and its row before it is there.
    domains = host.list_sessions(METADATA_NS)
    known = owned_guests(ledger.rows())
    for folder in live_sessions(layout):
        try:
            known.add(folder.info().uuid)
        except VmsandboxError:
            # A damaged record: its guest may be any of them. `stop NAME` removes it, when a person says so.
            name = f"vmsandbox-{folder.name}"
            known |= {domain.uuid for domain in domains if domain.name[:-7] == name}
    for domain in domains:
        if domain.home == str(layout.live) and domain.uuid not in known:
            why = "it belongs to no session"
        elif domain.home == str(layout.templates) and not _is_being_made(layout, domain.session_id):
            why = "its template was interrupted"
        else:
            continue
        try:
            host.destroy(domain.uuid)
            yield Removed("guest", domain.name, why)
        except VmsandboxError as error:
            yield Removed("guest", domain.name, why, f"{error.brief}: {error.details}")


def _stray_networks(layout: Layout, host: Host) -> Iterator[Removed]:
    """Networks of filtered guests, and folders of brokers' sockets, that belong to no session."""
    from vmsandbox.session.network.filtered import remove_stray_cards

    for name, left in remove_stray_cards(layout, host):
        yield Removed("network", name, "it belongs to no session", "; ".join(left))
    for folder in sorted(layout.run.glob("*.net")):
        if not (layout.live / folder.stem).exists():
            shutil.rmtree(folder, ignore_errors=True)
            yield Removed("socket", folder.name, "it belongs to no session")


def _is_being_made(layout: Layout, session_id: str) -> bool:
    return _maker_is_alive(layout.templates / session_id.removeprefix("template:"))


def _maker_is_alive(making: Path) -> bool:
    """The maker of a template holds a lock on `<folder>.lock` as long as it lives."""
    try:
        fd = os.open(making_lock(making), os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    finally:
        os.close(fd)


def unfinished_templates(layout: Layout) -> Iterator[Removed]:
    """Remove what is left of templates whose making or removal was interrupted."""
    for making in sorted(layout.templates.glob(".making-*")):
        if making.suffix == ".lock" or _maker_is_alive(making):
            continue
        shutil.rmtree(making, ignore_errors=True)
        shutil.rmtree(layout.run / f"t-{making.name.removeprefix('.making-')[:8]}", ignore_errors=True)
        making_lock(making).unlink(missing_ok=True)
        yield Removed("template", making.name, "its making was interrupted")
    for gone in sorted(layout.templates.glob(f"{GONE}*")):
        shutil.rmtree(gone, ignore_errors=True)
        yield Removed("template", gone.name, "its removal was interrupted")


def unused_templates(layout: Layout, all_of_them: bool) -> Iterator[Removed]:
    """Remove the templates that no session uses: all, or those not used for long. A base stays with what it carries."""
    store = TemplateStore(layout)
    with suppress(LedgerError):
        if all_of_them and someone_is_starting(store.ledger):
            yield Removed("template", "all", "asked for", "a session is starting and may have found one: try again")
            return
    in_use: set[str] = set()
    for folder in live_sessions(layout):
        with suppress(VmsandboxError):
            in_use.add(folder.info().template)
    in_use |= {base for key in in_use for base in store.bases_of(key)}
    # Those that stand on others first: a base that is kept for one of them is looked at after it.
    for path in sorted(store.list(), key=lambda path: len(store.bases_of(path.name)), reverse=True):
        if path.name in in_use:
            continue
        if any(store.base_of(other.name) == path.name for other in store.list()):
            continue
        with suppress(OSError):
            manifest = path / "manifest.json"
            days = (time.time() - (manifest if manifest.exists() else path).stat().st_mtime) / 86400
            if not manifest.exists():
                why = "its manifest is gone"
            elif all_of_them:
                why = "no session uses it"
            elif days > UNUSED_TEMPLATE_DAYS:
                why = f"not used for {days:.0f} days"
            else:
                continue
            store.remove(path.name)
            yield Removed("template", path.name, why)
