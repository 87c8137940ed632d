"""Removes what crashed processes left behind, by identity and never by name or age alone.

A session is garbage when the process that had to end it is gone, or its guest is. A template or image in the making
is garbage when nobody holds its lock. Everything that is alive is left alone; running it twice is harmless.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from vmsandbox.errors import VmsandboxError
from vmsandbox.hypervisor.connection import Host
from vmsandbox.hypervisor.template import TemplateStore
from vmsandbox.image.store import ImageStore
from vmsandbox.paths import Layout
from vmsandbox.render.domain import METADATA_NS
from vmsandbox.session.folder import SessionFolder, SessionInfo, live_sessions
from vmsandbox.session.teardown import tear_down
from vmsandbox.session.unfinished import parts_in_records, unfinished_projects

UNUSED_TEMPLATE_DAYS = 30


@dataclass(frozen=True)
class Removed:
    """One thing that was removed (or could not be: `problem` says why)."""

    kind: str
    what: str
    why: str
    problem: str = ""


def collect_garbage(layout: Layout, host: Host, *, all_templates: bool = False) -> list[Removed]:
    """Remove leftovers; returns what was done.

    all_templates: also remove every template that no live session uses.
    """
    removed = list(_dead_sessions(layout))
    removed += _stray_domains(layout, host)
    removed += _stray_networks(layout, host)
    removed += _unfinished_templates(layout)
    removed += unused_templates(layout, all_templates)
    removed += [
        Removed("image", path.name, "its build was interrupted") for path in ImageStore(layout).prune_building()
    ]
    removed += [Removed("record", *part) for part in parts_in_records(layout)]
    removed += [Removed("project", *part) for part in unfinished_projects(layout)]
    return removed


def guest_is_alive(folder: SessionFolder, info: SessionInfo) -> bool:
    """Whether the session's own QEMU process runs."""
    with suppress(OSError, ValueError):
        pid = int((folder.path / "qemu.pid").read_text())
        return info.uuid.encode() in Path(f"/proc/{pid}/cmdline").read_bytes()
    return False


def _dead_sessions(layout: Layout) -> Iterator[Removed]:
    for folder in live_sessions(layout):
        try:
            info = folder.info()
        except VmsandboxError as error:
            yield Removed("session", folder.name, "its record cannot be read", error.brief)
            continue
        if info.owner_is_alive:
            continue
        if info.owner_pid > 0:
            why = "the process that ran it is gone"
        elif not guest_is_alive(folder, info):
            why = "its guest is gone"
        else:
            continue
        yield Removed("session", folder.name, why, "; ".join(tear_down(layout, folder, info)))
    for staged in layout.live.glob(".*"):  # a claim that was interrupted before it had a name
        shutil.rmtree(staged, ignore_errors=True)
        yield Removed("session", staged.name, "its claim was interrupted")


def _stray_domains(layout: Layout, host: Host) -> Iterator[Removed]:
    """Guests of this installation whose folder is gone, or whose template nobody is making."""
    known = set()
    for folder in live_sessions(layout):
        with suppress(VmsandboxError):
            known.add(folder.info().uuid)
    for domain in host.list_sessions(METADATA_NS):
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
    from vmsandbox.session.filtered import remove_stray_cards

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
        fd = os.open(making.with_name(making.name + ".lock"), os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    finally:
        os.close(fd)


def _unfinished_templates(layout: Layout) -> Iterator[Removed]:
    for making in sorted(layout.templates.glob(".making-*")):
        if making.suffix == ".lock" or _maker_is_alive(making):
            continue
        shutil.rmtree(making, ignore_errors=True)
        shutil.rmtree(layout.run / f"t-{making.name.removeprefix('.making-')[:8]}", ignore_errors=True)
        making.with_name(making.name + ".lock").unlink(missing_ok=True)
        yield Removed("template", making.name, "its making was interrupted")


def unused_templates(layout: Layout, all_of_them: bool) -> Iterator[Removed]:
    """Remove the templates that no session uses: all, or those not used for long. A base stays with what it carries."""
    in_use: set[str] = set()
    for folder in live_sessions(layout):
        with suppress(VmsandboxError):
            in_use.add(folder.info().template)
    store = TemplateStore(layout)
    in_use |= {base for key in in_use for base in store.bases_of(key)}
    # Those that stand on others first: a base that is kept for one of them is looked at after it.
    for path in sorted(store.list(), key=lambda path: len(store.bases_of(path.name)), reverse=True):
        if path.name in in_use:
            continue
        if any(store.base_of(other.name) == path.name for other in store.list()):
            continue
        with suppress(OSError):
            days = (time.time() - (path / "manifest.json").stat().st_mtime) / 86400
            if all_of_them:
                why = "no session uses it"
            elif days > UNUSED_TEMPLATE_DAYS:
                why = f"not used for {days:.0f} days"
            else:
                continue
            store.remove(path.name)
            yield Removed("template", path.name, why)
