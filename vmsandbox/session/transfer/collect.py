"""Fetches what the guest made of the project into the session's quarantine.

The guest's sender, an SSH channel and the receiver process are joined here; nothing of what passes is looked at.
A return replaces the one before it only when it is whole; one that is refused leaves nothing.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from vmsandbox.errors import GuestError, UserInputError, VmsandboxError
from vmsandbox.failpoints import failpoint
from vmsandbox.journal import events
from vmsandbox.process import Programs
from vmsandbox.receive.protocol import ReturnLimits
from vmsandbox.receive.start import Received, receive
from vmsandbox.receive.store import Quarantine
from vmsandbox.review.manifest import Manifest, ManifestLimits, parse_untrusted_manifest
from vmsandbox.review.text import shown
from vmsandbox.session.live.running import RunningSandbox
from vmsandbox.session.records.record import Record

SENDER = "/usr/lib/vmsandbox/vmsandbox-return"
_PUSHED = ManifestLimits(bytes=1 << 30, entries=1_000_000)  # our own file


class Refused(NamedTuple):
    """An entry of the guest's tree that did not come back. Show the path through `review.text.shown` only."""

    path: str
    why: str


@dataclass(frozen=True)
class Collected:
    """One whole return.

    refused: what is in the guest and did not come: special files, what could not be read or is too large.
    files, bytes: blobs in the quarantine that are not as pushed. transferred: bytes that the guest sent.
    """

    pushed: Manifest
    quarantine: Quarantine
    refused: tuple[Refused, ...]
    files: int
    bytes: int
    transferred: int
    seconds: float

    @property
    def returned(self) -> Manifest:
        """The whole returned tree."""
        return self.quarantine.manifest


def collect(
    sandbox: RunningSandbox, *, limits: ReturnLimits | None = None, programs: Programs | None = None
) -> Collected:
    """Fetch the guest's tree: only what was touched since the push travels.

    Raises:
        UserInputError: nothing was pushed.
        GuestError: the guest went away, broke the protocol or passed a limit; nothing of it was kept.
        HostError: the host could not keep it.
    """
    record = sandbox.folder.record_folder(sandbox.info.id)
    if sandbox.info.guest_folder is None:
        raise UserInputError(
            f"nothing was copied into session {sandbox.name!r}",
            resolution=f"`vmsandbox push {sandbox.name} PATH` copies a project in",
        )
    with _alone(sandbox):
        _clear_interrupted(record)
        return _collect(sandbox, record, limits, programs)


def _collect(
    sandbox: RunningSandbox, record: Path, limits: ReturnLimits | None, programs: Programs | None
) -> Collected:
    assert sandbox.info.guest_folder is not None
    began = time.monotonic()
    fresh = record / f"quarantine.{secrets.token_hex(4)}"
    baseline = baseline_file(sandbox)
    with sandbox.monitor.step("fetching what the guest made of the project"):
        failpoint("return.begun")
        channel = sandbox.shell().start([SENDER, sandbox.info.guest_folder], plumbing=True)
        try:
            pushed_file = record / "pushed.jsonl"
            pushed = parse_untrusted_manifest([pushed_file.read_bytes()], _PUSHED)
            received = receive(
                channel, fresh, pushed, pushed_file, baseline if baseline.exists() else None,
                limits=limits, programs=programs,
                on_progress=lambda moved, promised: sandbox.monitor.progress(moved, promised or None, "bytes"),
            )  # fmt: skip
        except VmsandboxError as error:
            sandbox.journal.append(events.ReturnRefused(error.brief, error.details))
            raise _with_last_words(error, channel) from error
        finally:
            channel.close()
    failpoint("return.received")
    Record(record).keep_base_in(received.quarantine.folder)
    quarantine = _publish(received.quarantine, record / "quarantine")
    failpoint("return.published")
    refused = _refused(pushed, received)
    seconds = round(time.monotonic() - began, 3)
    sandbox.journal.append(
        events.ReturnReceived(
            manifest=quarantine.digest,
            files=received.files,
            bytes=received.bytes,
            transferred=received.transferred,
            refused=[row.path for row in refused],
            confined=list(received.confined),
            seconds=seconds,
        )
    )
    return Collected(pushed, quarantine, refused, received.files, received.bytes, received.transferred, seconds)


def refusal_text(refused: tuple[Refused, ...]) -> str:
    """What did not come back and why, in a line that is safe to show."""
    listed = "; ".join(f"{shown(row.path, 200)}: {row.why}" for row in refused[:5])
    more = f"; and {len(refused) - 5} more" if len(refused) > 5 else ""
    return f"in the guest, but not brought back: {listed}{more}"


def baseline_file(sandbox: RunningSandbox) -> Path:
    """Where the guest's own listing of what was just pushed is kept (untrusted; see receive.listing)."""
    return sandbox.folder.path / "baseline"


@contextmanager
def _alone(sandbox: RunningSandbox) -> Iterator[None]:
    """One return of a session at a time. Raises UserInputError if another one is under way."""
    fd = os.open(sandbox.folder.path / "collect.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise UserInputError(
            f"the changes of session {sandbox.name!r} are being fetched already", resolution="try again in a moment"
        ) from None
    finally:
        os.close(fd)


def _clear_interrupted(record: Path) -> None:
    """Remove what a return that was killed has left; the last whole one stays."""
    for path in record.glob("quarantine.*"):
        if path.suffix == ".old" and not (record / "quarantine").exists():
            path.rename(record / "quarantine")
        else:
            shutil.rmtree(path, ignore_errors=True)


def _publish(quarantine: Quarantine, place: Path) -> Quarantine:
    """Put a whole return where the one before it was."""
    old = place.with_name(f"{quarantine.folder.name}.old")
    if place.exists():
        place.rename(old)
        failpoint("return.half-published")
    quarantine.folder.rename(place)
    shutil.rmtree(old, ignore_errors=True)
    return Quarantine(place, quarantine.manifest, quarantine.digest)


def _refused(pushed: Manifest, received: Received) -> tuple[Refused, ...]:
    rows = [Refused(path, "the folder could not be looked into; what was pushed of it stays") for path in received.held]
    for path, item in received.quarantine.manifest.items.items():
        if item.kind == "other":
            rows.append(Refused(path, "not a file, folder or link"))
        elif item.kind == "file" and item.sha256 is None and pushed.items.get(path) != item:
            rows.append(Refused(path, "it could not be read, or is too large"))
    return tuple(sorted(rows))


def _with_last_words(error: VmsandboxError, channel: object) -> VmsandboxError:
    """The same error, with what the guest's sender said on its stderr."""
    from vmsandbox.session.transfer.archive import last_words

    if isinstance(error, GuestError) and (words := last_words(channel)):
        error.details = f"{error.details}\nthe guest's sender said: {words}".strip()
    return error
