"""The snapshots of one session: taken, listed, removed.

    live/<name>/snapshots/<tag>/        disk.qcow2, ram, state, manifest.json (vmsandbox.hypervisor.snapshot)
    live/<name>/snapshots/<tag>/host/   what the host knew of the guest's tree then

What the guest holds and what the host knows of it go together: rolled back without that, the files that were accepted
since would look as if the guest had taken them away.
"""

from __future__ import annotations

import json
import re
import secrets
import shutil
from contextlib import closing, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vmsandbox.errors import GuestError, HostError, UserInputError, VmsandboxError
from vmsandbox.hypervisor.connection import Host
from vmsandbox.hypervisor.launch import disk_errors
from vmsandbox.hypervisor.snapshot import MANIFEST, Running, find_snapshot, go_on, publish_snapshot, take
from vmsandbox.hypervisor.template import DISK, TemplateStore
from vmsandbox.journal import events
from vmsandbox.removal import GONE, put_aside
from vmsandbox.session.live.running import RunningSandbox
from vmsandbox.session.opening.made import is_emulated
from vmsandbox.session.resources.quotas import check_quota
from vmsandbox.session.rewind.replug import give_card_back, without_card
from vmsandbox.session.state.folder import SessionFolder
from vmsandbox.session.state.guestlock import guest_locked
from vmsandbox.session.state.info import SessionInfo
from vmsandbox.session.upkeep.freezing import is_frozen, stay_frozen

if TYPE_CHECKING:
    from vmsandbox.hypervisor.snapshot import Snapshot

START = "start"  # the tag of the first one, taken when `start` is done
_TAG = re.compile(r"[a-z0-9]([a-z0-9._-]{0,38}[a-z0-9])?")
_KNOWN = ("pushed.jsonl", "base.jsonl", "withheld.json", "findings.json", "history.json")


@dataclass(frozen=True)
class SnapshotRow:
    """One snapshot, for people. bytes: that it takes on the host's disk. pause: seconds that the guest stood still."""

    tag: str
    parent: str | None
    created: str
    bytes: int
    pause: float


def checked_tag(tag: str) -> str:
    """A tag that is safe as a folder's name. Raises UserInputError."""
    if not _TAG.fullmatch(tag):
        raise UserInputError(
            f"not a snapshot's name: {tag!r}",
            details="1 to 40 characters: a-z, 0-9, '.', '_' and '-', with a letter or digit at both ends",
        )
    return tag


def take_snapshot(sandbox: RunningSandbox, tag: str) -> SnapshotRow:
    """Take a snapshot of a running session.

    Raises:
        UserInputError: there is one with this tag, or the guest cannot have any.
        HostError: libvirt, QEMU or the disk failed; the guest goes on.
        GuestError: it does not let its network card go, or did not set it up again.
        RefusedError: its card could not be guarded as before (`session.rewind.replug`).
    """
    folder = sandbox.folder
    target = folder.snapshots / checked_tag(tag)
    with guest_locked(folder), sandbox.monitor.step(f"taking snapshot {tag}"):
        info = folder.info()
        _refuse_impossible(folder, info)
        if target.exists():
            raise UserInputError(
                f"session {info.name!r} has a snapshot {tag!r} already",
                resolution=f"choose another name, or `vmsandbox snapshots {info.name} --remove {tag}`",
            )
        check_quota(sandbox.layout)
        base = TemplateStore(sandbox.layout).find(info.template)
        if base is None:
            raise HostError(f"the template of session {info.name!r} is gone", details=info.template)
        taking = folder.snapshots / f".taking-{secrets.token_hex(4)}"
        host = Host.open()
        try:
            with disk_errors("taking the snapshot"):
                taking.mkdir(mode=0o700, parents=True)
                _keep_known(folder, info, taking / "host")
            guest = Running(
                info.uuid,
                folder.qemu_pid(info),
                folder.vm(info) / DISK,
                info.memory_mib << 20,
                base.state,
                is_emulated(folder),
            )
            with without_card(host, folder, info):
                try:
                    taken = take(host, guest, taking)
                finally:
                    stay_frozen(folder, info, host)
            facts = {"key": secrets.token_hex(16), "tag": tag, "parent": _standing_on(folder), "created": _now()}
            publish_snapshot(taken, target, base, facts)
        except BaseException:
            try:
                # by a connection of its own: libvirtd may have been restarted meanwhile
                recover_snapshots(folder, info)
            except (VmsandboxError, OSError) as error:
                sandbox.monitor.warning(
                    f"the guest of {info.name} may stand still: {error}; `vmsandbox gc` lets it go on"
                )
            raise
        finally:
            host.close()
        _stand_on(folder, tag)
    row = _row(target)
    sandbox.journal.append(events.SnapshotTaken(tag, row.parent, row.bytes, row.pause))
    return row


def keep_start(sandbox: RunningSandbox) -> None:
    """Take the first one. Where that fails the guest is of use all the same, and says so when it is to roll back.

    Raises:
        GuestError: the guest has ended meanwhile.
    """
    sandbox.disconnect()  # else an sshd that serves nobody is in every guest that comes of it
    try:
        take_snapshot(sandbox, START)
    except (VmsandboxError, OSError) as error:
        if not sandbox.folder.guest_is_alive(sandbox.info):
            raise GuestError(
                "the guest ended while its start was kept",
                details=str(error),
                resolution=f"try again; `vmsandbox logs {sandbox.info.id}` shows how far it came",
            ) from error
        # Also one that was frozen to be looked at meanwhile.
        sandbox.monitor.warning(f"its start was not kept, so it cannot be rolled back to it: {error}")


def snapshot_of(folder: SessionFolder, info: SessionInfo, tag: str | None, *, thoroughly: bool = False) -> Snapshot:
    """A snapshot by its tag (None: the session's start), unchanged since it was taken.

    Raises:
        UserInputError: there is none of this name.
        ImageError: it, or the template below it, was changed.
    """
    path = folder.snapshots / checked_tag(tag or START)
    if not path.is_dir():
        rows = ", ".join(row.tag for row in snapshots(folder)) or "none"
        raise UserInputError(
            f"session {info.name!r} has no snapshot {tag!r}" if tag else f"of session {info.name!r} no start was kept",
            details=f"there are: {rows}",
            resolution=f"`vmsandbox snapshot {info.name} TAG` takes one; what `vmsandbox start` made has {START!r}",
        )
    base = TemplateStore(folder.layout).find(info.template)
    if base is None:
        raise HostError(f"the template of session {info.name!r} is gone", details=info.template)
    return find_snapshot(path, base, thoroughly=thoroughly)


def snapshots(folder: SessionFolder) -> list[SnapshotRow]:
    """All of a session's, by time. Damaged ones are left out."""
    rows = []
    for path in folder.snapshots.glob("[!.]*") if folder.snapshots.is_dir() else ():
        with suppress(OSError, ValueError, KeyError):
            rows.append(_row(path))
    return sorted(rows, key=lambda row: (row.created, row.tag))


def remove_snapshot(sandbox: RunningSandbox, tag: str) -> int:
    """Delete a snapshot; the bytes that were given back. Those that stand on it go on, and on what it stood on.

    Raises:
        UserInputError: there is none. HostError: it cannot be removed.
    """
    folder = sandbox.folder
    path = folder.snapshots / checked_tag(tag)
    with guest_locked(folder), disk_errors("removing the snapshot"):
        if not path.is_dir():
            raise UserInputError(f"session {folder.name!r} has no snapshot {tag!r}")
        freed, parent = 0, None
        with suppress(OSError, ValueError, KeyError):
            row = _row(path)
            freed, parent = row.bytes, row.parent
        shutil.rmtree(put_aside(path))
        for lock in folder.snapshots.glob(".*.memory"):
            lock.unlink()
        if _standing_on(folder) == tag:
            _stand_on(folder, parent)
        for other in folder.snapshots.glob(f"[!.]*/{MANIFEST}"):
            with suppress(ValueError):
                manifest = json.loads(other.read_text())
                if manifest.get("parent") == tag:
                    fresh = other.with_name(f".{MANIFEST}")
                    fresh.write_text(json.dumps({**manifest, "parent": parent}, indent=1, sort_keys=True))
                    fresh.rename(other)
    sandbox.journal.append(events.SnapshotRemoved(tag, freed))
    return freed


def restore_known(folder: SessionFolder, info: SessionInfo, tag: str) -> None:
    """Make what the host knows of the guest's tree what it was with this snapshot. Twice is harmless."""
    kept = folder.snapshots / tag / "host"
    if kept.is_dir():  # else it was removed since: what the host knows stays
        copy_known(kept, folder.record_folder(info.id), folder.path / "baseline")
        _stand_on(folder, tag)


def copy_known(kept: Path, record: Path, baseline: Path) -> None:
    """From a snapshot's folder into a session's own."""
    for target in (*(record / name for name in _KNOWN), baseline):
        source = kept / target.name
        if not source.exists():
            target.unlink(missing_ok=True)
            continue
        fresh = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
        shutil.copyfile(source, fresh)
        fresh.replace(target)


def known_facts(folder: SessionFolder, tag: str) -> dict[str, Any]:
    """Where the project lay in the guest, and on the host, when a snapshot was taken."""
    facts = json.loads((folder.snapshots / tag / "host" / "session.json").read_text())
    return {"guest_folder": facts["guest_folder"], "project": facts["project"]}


def recover_snapshots(folder: SessionFolder, info: SessionInfo) -> list[str]:
    """Undo what a process that died was doing: its files go, and a guest that it held still runs on. What was done.

    Call it under `guest_locked`. Raises HostError.
    """
    left = [*folder.snapshots.glob(".taking-*"), *folder.snapshots.glob(f"{GONE}*")]
    if left and not is_frozen(folder):
        with closing(Host.open()) as host:
            go_on(host, info.uuid)
    for path in left:
        shutil.rmtree(path, ignore_errors=True)
    done = ["a snapshot that was interrupted is removed" for _ in left]
    return [*done, "its network card was given back"] if give_card_back(folder, info) else done


def _refuse_impossible(folder: SessionFolder, info: SessionInfo) -> None:
    if not info.ready:
        raise UserInputError(f"session {info.name!r} is still starting", resolution="try again when it is ready")
    if is_frozen(folder):
        raise UserInputError(
            f"session {info.name!r} is frozen: taking a snapshot would let its processors run for a moment",
            resolution=f"`vmsandbox thaw {info.name}` first",
        )


def _keep_known(folder: SessionFolder, info: SessionInfo, target: Path) -> None:
    target.mkdir()
    record = folder.record_folder(info.id)
    for source in (*(record / name for name in _KNOWN), folder.path / "baseline", folder.path / "session.json"):
        with suppress(FileNotFoundError):
            shutil.copyfile(source, target / source.name)


def _row(path: Path) -> SnapshotRow:
    manifest = json.loads((path / MANIFEST).read_text())
    return SnapshotRow(
        path.name, manifest["parent"], manifest["created"], int(manifest["bytes"]), float(manifest["pause"])
    )


def _standing_on(folder: SessionFolder) -> str | None:
    """The snapshot that the session was last at: the parent of the next one."""
    with suppress(OSError):
        tag = (folder.snapshots / ".at").read_text()
        return tag if (folder.snapshots / tag).is_dir() else None
    return None


def _stand_on(folder: SessionFolder, tag: str | None) -> None:
    if tag is None:
        (folder.snapshots / ".at").unlink(missing_ok=True)
    else:
        (folder.snapshots / ".at").write_text(tag)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
