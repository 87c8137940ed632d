"""Starts the receiver, carries bytes between it and the guest, and believes neither.

This side parses only what the receiver says, as strictly as if the guest had said it: the manifest once more, and
for each file that is not as it was pushed a blob of that size. Time and rate are watched here, from outside.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import shutil
import stat
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from vmsandbox.errors import GuestError, HostError
from vmsandbox.process import Programs
from vmsandbox.receive.carry import HOSTILE, Carrying, Wire, failure, watch
from vmsandbox.receive.protocol import ReturnLimits
from vmsandbox.receive.store import Quarantine, seal
from vmsandbox.review.manifest import Manifest, ManifestLimits, parse_untrusted_manifest
from vmsandbox.review.text import shown

# -I, -S: no environment, no user's site folder, no .pth file; the package's folder comes last, shadowing nothing.
_START = "import sys; sys.path.append(sys.argv[1]); from vmsandbox.receive.child import main; main(sys.argv[2])"
_PIPE = 1 << 20
# A user of its own for each return: 0x70000000-0x7fffffff is assigned to nothing (systemd's UIDS-GIDS document).
_UID_BASE, _UID_RANGE, _NOBODY = 0x70000000, 0x0FFFFFFE, 65534


@dataclass(frozen=True)
class Received:
    """What came back. held: folders that the guest could not look into; what was pushed of them counts as unchanged.

    files, bytes: blobs that were kept, and what they take. transferred: bytes that the guest sent.
    confined: what held the receiver beside its limits ("user", "landlock", "seccomp").
    """

    quarantine: Quarantine
    held: tuple[str, ...]
    files: int
    bytes: int
    transferred: int
    confined: tuple[str, ...]


def receive(
    wire: Wire,
    into: Path,
    pushed: Manifest,
    pushed_file: Path,
    baseline: Path | None,
    *,
    limits: ReturnLimits | None = None,
    programs: Programs | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Received:
    """Take a whole return into a new quarantine.

    Args:
        wire: to the guest's sender, which has just been started; closed at the end.
        into: folder to make.
        pushed, pushed_file: the manifest of what was pushed, and its file.
        baseline: what the sender's --baseline wrote after the push; None has every file sent.
        on_progress: told (bytes so far, bytes to come at least).

    Raises:
        GuestError: the guest broke the protocol or passed a limit. HostError: the host could not keep it.
            In both cases `into` is removed.
    """
    limits = limits or ReturnLimits()
    try:
        into.mkdir(mode=0o700)
        (into / "blobs").mkdir(mode=0o700)
        user = _own_user(into / "blobs")
        carried = _carry(wire, into / "blobs", pushed_file, baseline, user, limits, programs or Programs(), on_progress)
        manifest = _returned(pushed, carried, limits)
        needed = _check_blobs(into / "blobs", pushed, manifest)
        told = carried.outcome
        return Received(
            quarantine=seal(into, manifest),
            held=tuple(str(path) for path in told["held"]),
            files=len(needed),
            bytes=sum(needed.values()),
            transferred=carried.moved,
            confined=tuple(str(word) for word in told["confined"]),
        )
    except BaseException as error:
        shutil.rmtree(into, ignore_errors=True)
        if isinstance(error, OSError):
            raise HostError("what came back cannot be kept", details=str(error)) from error
        raise
    finally:
        wire.close()


def _carry(
    wire: Wire, blobs: Path, pushed: Path, baseline: Path | None, user: int | None, limits: ReturnLimits,
    programs: Programs, on_progress: Callable[[int, int], None] | None,
) -> Carrying:  # fmt: skip
    """Run the receiver to its end. Raises GuestError or HostError if the return failed."""
    with _opened(blobs, os.O_DIRECTORY) as folder, _opened(pushed) as pushed_fd, _opened(baseline) as baseline_fd:
        asked = {
            "folder": folder, "pushed": pushed_fd, "baseline": baseline_fd, "user": user, "limits": asdict(limits),
        }  # fmt: skip
        package = Path(__file__).resolve().parents[2]
        argv: list[str | Path] = [sys.executable, "-I", "-S", "-c", _START, package, json.dumps(asked)]
        fds = [fd for fd in (folder, pushed_fd, baseline_fd) if fd >= 0]
        with programs.piped(argv, pass_fds=fds) as child:
            for pipe in (child.stdin, child.stdout):
                with suppress(OSError):
                    fcntl.fcntl(pipe.fileno(), fcntl.F_SETPIPE_SZ, _PIPE)
            carrying = Carrying(wire, child)
            threads = [
                threading.Thread(target=carrying.feed, daemon=True),
                threading.Thread(target=carrying.answer, args=(_manifest_limits(limits).bytes,), daemon=True),
            ]
            for thread in threads:
                thread.start()
            try:
                watch(carrying, limits, on_progress)
            finally:
                wire.close()
                if not carrying.ended.is_set():
                    os.kill(child.pid, 9)
                for thread in threads:
                    thread.join(10)
            if carrying.outcome.get("fault"):
                raise failure(carrying)
            return carrying


def _returned(pushed: Manifest, carried: Carrying, limits: ReturnLimits) -> Manifest:
    """The whole tree: what was pushed, without what is gone, with what changed. Raises GuestError if it is none."""
    try:
        changed = parse_untrusted_manifest([bytes(carried.changed)], _manifest_limits(limits)).items
    except GuestError as error:
        error.resolution = HOSTILE
        raise
    items = {path: item for path, item in pushed.items.items() if path not in carried.gone}
    items.update(changed)
    for path in items:
        parent = path.rpartition("/")[0]
        if parent and (parent not in items or items[parent].kind != "dir"):
            raise GuestError(
                "what the guest sent back contradicts itself",
                details=f"no folder for {shown(path)}",
                resolution=HOSTILE,
            )
    return Manifest(items)


def _check_blobs(blobs: Path, pushed: Manifest, returned: Manifest) -> dict[str, int]:
    """Digest → size of the blobs that the manifest needs. Raises GuestError if one is not there as it has to be.

    Blobs of files that are as they were pushed after all stay: what was accepted meanwhile may make them the new side
    of a change. Everything else goes.
    """
    sizes = {item.sha256: item.size for item in returned.items.values()}
    needed = {
        item.sha256: item.size
        for path, item in returned.items.items()
        if item.sha256 is not None and pushed.items.get(path) != item
    }
    missing = set(needed)
    with os.scandir(blobs) as found:
        for entry in found:
            if entry.name not in sizes:
                Path(entry.path).unlink()
                continue
            status = entry.stat(follow_symlinks=False)
            if not stat.S_ISREG(status.st_mode) or status.st_size != sizes[entry.name] or status.st_nlink != 1:
                missing.add(entry.name)
            else:
                missing.discard(entry.name)
    if missing:
        raise GuestError("the receiver's manifest and files do not agree", details=min(missing), resolution=HOSTILE)
    return needed


def _own_user(blobs: Path) -> int | None:
    """Give the folder to a user that nobody else is; None if this process may not (the receiver stays who it is)."""
    if os.geteuid() != 0:
        return None
    for user in (_UID_BASE + secrets.randbelow(_UID_RANGE), _NOBODY):  # a user namespace may not know the first
        with suppress(OSError):
            os.chown(blobs, user, user)
            return user
    raise HostError("the receiver cannot be given a user of its own", details=f"chown {blobs}")


@contextmanager
def _opened(path: Path | None, flags: int = 0) -> Iterator[int]:
    """A descriptor for reading; -1 for no path."""
    fd = -1 if path is None else os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | flags)
    try:
        yield fd
    finally:
        if fd >= 0:
            os.close(fd)


def _manifest_limits(limits: ReturnLimits) -> ManifestLimits:
    return ManifestLimits(bytes=2 * limits.listing_bytes, entries=2 * limits.entries, depth=limits.depth)
