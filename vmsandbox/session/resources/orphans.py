"""What the ledger knows of and nobody owns any more: found and removed by identity, also where a folder is lost.

An owner is the process that wrote a row, as long as it runs, or the session's folder, as long as it carries that
session's id. Of a session that lives, a guest or sockets that are not (or not any more) its own have none: a rollback
that was killed in the middle leaves such.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from vmsandbox.apply.recovery import pending
from vmsandbox.errors import HostError, VmsandboxError
from vmsandbox.hypervisor.connection import Host
from vmsandbox.hypervisor.lost import end_lost
from vmsandbox.hypervisor.template import making_lock
from vmsandbox.ledger.admission import QEMU
from vmsandbox.ledger.book import Kind, Ledger, Row, things_of
from vmsandbox.ledger.processes import Process
from vmsandbox.paths import IMAGE_NAME, SESSION_NAME, Layout
from vmsandbox.process import Programs
from vmsandbox.session.state.folder import SessionFolder
from vmsandbox.session.state.info import SessionInfo

_WHY = "the ledger has it, and what it belonged to is gone"
_UUID = "[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}"
_NAMES = {
    Kind.SOCKETS: re.compile(rf"{SESSION_NAME.pattern}-[0-9a-f]{{6}}|{SESSION_NAME.pattern}\.net|t-[0-9a-f]{{8}}"),
    Kind.FOLDER: SESSION_NAME,
    Kind.SNAPSHOT: re.compile(rf"{SESSION_NAME.pattern}/snapshots/[A-Za-z0-9][A-Za-z0-9._-]*"),
    Kind.TEMPLATE: re.compile(rf"\.making-{_UUID}"),
    Kind.IMAGE: re.compile(rf"{IMAGE_NAME.pattern}/\.building-[0-9a-z_]+"),
}
_TEMPLATE = "template:"  # what stands in the place of a session, of a template in the making
# What runs goes first, what it used afterwards.
_ORDER = (Kind.PROCESS, Kind.DOMAIN, Kind.NETWORK, Kind.SOCKETS, Kind.TEMPLATE, Kind.IMAGE, Kind.SNAPSHOT, Kind.FOLDER)


@dataclass(frozen=True)
class Removed:
    """One thing that was removed (or could not be: `problem` says why)."""

    kind: str
    what: str
    why: str
    problem: str = ""


@dataclass(frozen=True)
class Orphan:
    """Rows of one session (or template, or build) that nobody owns."""

    session: str
    rows: tuple[Row, ...]


def orphans(layout: Layout, rows: Iterable[Row]) -> list[Orphan]:
    """The rows that nobody owns, by session. Changes that are being applied are another matter (`unfinished`)."""
    by_session: dict[str, list[Row]] = {}
    for row in rows:
        if row.kind != Kind.APPLY:
            by_session.setdefault(row.session, []).append(row)
    found = []
    for session, its in by_session.items():
        if any(row.maker_is_alive for row in its):
            continue
        folder, info = _folder_of(layout, session, its)
        if info is not None and folder is not None:
            its = _not_its_own(folder, info, its)
        elif folder is not None:
            continue  # its record cannot be read: `stop` removes it, when a person says so
        if its:
            found.append(Orphan(session, tuple(its)))
    return found


def owned_guests(rows: Iterable[Row]) -> set[str]:
    """The UUIDs of guests that a process is at work on right now."""
    return {row.identity for row in rows if row.kind == Kind.DOMAIN and row.maker_is_alive}


def remove_orphan(layout: Layout, host: Host, orphan: Orphan, programs: Programs | None = None) -> Iterator[Removed]:
    """End and remove what is left of it; what is gone leaves the ledger. Twice is harmless."""
    remover = _Remover(layout, host, orphan.session, programs or Programs())
    ledger = Ledger.of(layout)
    gone = []
    for kind in _ORDER:
        for row in orphan.rows:
            if row.kind != kind:
                continue
            what = f"{orphan.session}: {row.identity}"
            try:
                was_there = remover.remove(kind, row.identity)
            except (VmsandboxError, OSError) as error:
                details = f": {error.details}" if isinstance(error, VmsandboxError) and error.details else ""
                yield Removed(kind.value, what, _WHY, f"{error}{details}")
                continue
            gone.append(row)
            if was_there and not (kind is Kind.SOCKETS and orphan.session.startswith(_TEMPLATE)):  # it says enough
                yield Removed(kind.value, what, _WHY)
    if len(gone) == len(orphan.rows) == len(ledger.rows(orphan.session)):
        ledger.forget(orphan.session)
    else:
        ledger.gone(orphan.session, *things_of(gone))
    unknown = [row for row in orphan.rows if row.kind not in _ORDER]
    for row in unknown:
        yield Removed(row.kind, f"{orphan.session}: {row.identity}", _WHY, "this version does not know such a thing")


def told(layout: Layout, orphan: Orphan) -> str:
    """What may still be there of it, in words, without asking anybody."""
    parts = []
    for row in orphan.rows:
        if row.kind == Kind.PROCESS:
            process, _, part = row.identity.partition(" ")
            with suppress(ValueError):
                if Process.parse(process).is_alive:
                    parts.append(f"process {process.partition(':')[0]} ({part})")
        elif row.kind in _NAMES:
            with suppress(HostError):
                if _path(layout, Kind(row.kind), row.identity).exists():
                    parts.append(f"{row.kind} {row.identity}")
        else:
            parts.append(f"perhaps {row.kind} {row.identity}")
    return ", ".join(parts) or "nothing that can be seen"


def applied_to(rows: Iterable[Row]) -> dict[Path, list[Row]]:
    """Projects that a process which is gone was writing changes into, or may have been."""
    found: dict[Path, list[Row]] = {}
    for row in rows:
        if row.kind == Kind.APPLY and not row.maker_is_alive:
            found.setdefault(Path(row.identity), []).append(row)
    return found


def forget_applied(layout: Layout, found: dict[Path, list[Row]]) -> None:
    """Take those out of the ledger that are whole."""
    for project, rows in found.items():
        with suppress(VmsandboxError, OSError):
            if not project.is_dir() or not pending(project):
                for row in rows:
                    Ledger.of(layout).gone(row.session, (Kind.APPLY, row.identity))


class _Remover:
    """Removes one thing of a session; each says whether it was there, and raises if it is there still."""

    def __init__(self, layout: Layout, host: Host, session: str, programs: Programs) -> None:
        self._layout = layout
        self._host = host
        self._session = session
        self._programs = programs
        self._ways: dict[Kind, Callable[[str], bool]] = {
            Kind.PROCESS: self._process,
            Kind.DOMAIN: self._domain,
            Kind.NETWORK: self._network,
            Kind.SOCKETS: lambda name: self._folder(Kind.SOCKETS, name),
            Kind.TEMPLATE: self._template,
            Kind.IMAGE: self._image,
            Kind.SNAPSHOT: self._below_live,
            Kind.FOLDER: self._below_live,
        }

    def remove(self, kind: Kind, identity: str) -> bool:
        return self._ways[kind](identity)

    def _process(self, identity: str) -> bool:
        text, _, part = identity.partition(" ")
        try:
            process = Process.parse(text)
        except ValueError:
            raise HostError(f"the ledger's row is no process: {identity!r}") from None
        if not process.is_alive:
            return False
        if not process.end(None if part == QEMU else 8.0):
            raise HostError(f"process {process.pid} ({part}) does not end")
        return True

    def _domain(self, uuid: str) -> bool:
        if not re.fullmatch(_UUID, uuid):
            raise HostError(f"the ledger's row is no UUID: {uuid!r}")
        known = self._host.destroy(uuid)
        # libvirt forgets guests when its own state is lost; QEMU's command line does not.
        return end_lost(uuid) or known

    def _network(self, name: str) -> bool:
        from vmsandbox.hypervisor.network import remove_network, stray_names
        from vmsandbox.render.network import CardPlan

        if name != CardPlan(self._session, self._layout.live, "", "").name:
            raise HostError(f"the ledger's row is not a network of this session: {name!r}")
        if self._programs.find("nft") is None or name not in stray_names(self._host, self._layout.live, self._programs):
            return False
        if left := remove_network(self._host, name, self._programs):
            raise HostError("the network could not be removed", details="; ".join(left))
        return True

    def _folder(self, kind: Kind, name: str) -> bool:
        path = _path(self._layout, kind, name)
        if not path.is_symlink() and not path.exists():
            return False
        if path.is_symlink():
            path.unlink()
        else:
            shutil.rmtree(path)
        return True

    def _template(self, name: str) -> bool:
        making_lock(_path(self._layout, Kind.TEMPLATE, name)).unlink(missing_ok=True)
        return self._folder(Kind.TEMPLATE, name)

    def _image(self, name: str) -> bool:
        """Builders hold a lock, and leave scratch folders elsewhere: the store knows how to remove one."""
        from vmsandbox.image.store import remove_building

        path = _path(self._layout, Kind.IMAGE, name)
        if not path.exists():
            return False
        remove_building(path, self._programs)
        return True

    def _below_live(self, _name: str) -> bool:
        """Its folder does not carry the session's id any more, so what is in it is not the session's."""
        return False


def _folder_of(layout: Layout, session: str, rows: list[Row]) -> tuple[SessionFolder | None, SessionInfo | None]:
    """The session's folder, if it is there, and its record, if that can be read. Another session's is None."""
    for row in rows:
        if row.kind == Kind.FOLDER and SESSION_NAME.fullmatch(row.identity):
            folder = SessionFolder(layout, row.identity)
            if not folder.path.exists():
                continue
            try:
                info = folder.info()
            except VmsandboxError:
                return folder, None
            if info.id == session:
                return folder, info
    return None, None


def _not_its_own(folder: SessionFolder, info: SessionInfo, rows: list[Row]) -> list[Row]:
    own = {
        (Kind.DOMAIN.value, info.uuid),
        (Kind.SOCKETS.value, folder.sockets(info).name),
        (Kind.SOCKETS.value, folder.net.name),
    }
    return [row for row in rows if row.kind in (Kind.DOMAIN, Kind.SOCKETS) and (row.kind, row.identity) not in own]


def _path(layout: Layout, kind: Kind, name: str) -> Path:
    """Where a thing lies. Raises HostError for a name that no program of ours wrote: nothing is removed by it."""
    if not _NAMES[kind].fullmatch(name):
        raise HostError(f"the ledger's row is no name of a {kind.value}: {name!r}")
    parents = {Kind.SOCKETS: layout.run, Kind.TEMPLATE: layout.templates, Kind.IMAGE: layout.images}
    return parents.get(kind, layout.live) / name
