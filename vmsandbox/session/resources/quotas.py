"""How much of the host's disk all sessions together may have: running guests, and what their records keep.

Without it a host that runs sessions every night is full one morning, of backups and quarantines that nobody looks at.

    VMSANDBOX_QUOTA=50G      the limit (default: 50 GiB, or 80 % of what the disk would have free without us, if less)

`gc` makes room when it is passed: backups but the newest of each project, the oldest first, then what came back of
sessions that ended more than 30 days ago. A journal is never removed but by `gc --older-than DAYS`, which removes whole
records. A session does not start while the limit is passed.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from vmsandbox.errors import HostError, UserInputError, VmsandboxError
from vmsandbox.paths import Layout
from vmsandbox.removal import GONE, put_aside
from vmsandbox.session.records.backup import FOLDER as BACKUP
from vmsandbox.session.records.backup import prune
from vmsandbox.session.resources.orphans import Removed
from vmsandbox.session.state.folder import live_sessions

VARIABLE = "VMSANDBOX_QUOTA"
DEFAULT = 50 << 30
SHARE = 0.8
QUARANTINE = "quarantine"
QUARANTINE_DAYS = 30
_GOOD_FOR = 600.0  # seconds that a measurement is taken for
_DAY = 86400


@dataclass(frozen=True)
class Usage:
    """Bytes on disk, by what they are for. A file that is linked into several places counts once."""

    guests: int = 0
    snapshots: int = 0
    backups: int = 0
    quarantine: int = 0
    records: int = 0

    @property
    def total(self) -> int:
        """All of it."""
        return self.guests + self.snapshots + self.backups + self.quarantine + self.records

    def text(self) -> str:
        """In words."""
        parts = ((name, size) for name, size in asdict(self).items() if size >= 1 << 20)
        return ", ".join(f"{name} {size / 2**30:.1f} GiB" for name, size in parts) or "next to nothing"


def usage_of(layout: Layout) -> Usage:
    """Measure now. What vanishes meanwhile counts for nothing."""
    seen: set[tuple[int, int]] = set()
    sizes = dict.fromkeys(asdict(Usage()), 0)
    for top, within in ((layout.live, "guests"), (layout.records, "records")):
        for folder, _, names in os.walk(top):
            words = Path(folder).relative_to(top).parts
            kind = _kind(within, words)
            for name in names:
                with suppress(OSError):
                    status = os.lstat(os.path.join(folder, name))  # noqa: PTH118 - thousands of them
                    if (key := (status.st_dev, status.st_ino)) not in seen:
                        seen.add(key)
                        sizes[kind] += status.st_blocks * 512
    return Usage(**sizes)


def limit_of(layout: Layout, usage: Usage, environ: Mapping[str, str] | None = None) -> int:
    """Bytes that all sessions together may have. Raises UserInputError for a limit that is no size."""
    text = (os.environ if environ is None else environ).get(VARIABLE)
    if text:
        from vmsandbox.policy.format.words import size

        try:
            return size(text)
        except ValueError as error:
            raise UserInputError(
                f"{VARIABLE}={text}: {error}", resolution=f"a size such as {VARIABLE}=50G, or none for the default"
            ) from error
    place = next(parent for parent in (layout.live, *layout.live.parents) if parent.is_dir())
    disk = os.statvfs(place)
    return min(DEFAULT, int(SHARE * (disk.f_bavail * disk.f_frsize + usage.total)))


def check_quota(layout: Layout) -> None:
    """Refuse another session while the limit is passed. Raises HostError, or UserInputError by the variable."""
    usage = _measured(layout) or measure(layout)
    if usage.total <= limit_of(layout, usage):
        return
    usage = measure(layout)  # `stop` and the like do not measure
    limit = limit_of(layout, usage)
    if usage.total > limit:
        raise HostError(
            f"sessions and their records have more of the disk than they may: {usage.total / 2**30:.1f} GiB "
            f"of {limit / 2**30:.1f} GiB",
            details=usage.text(),
            resolution=f"`vmsandbox gc` makes room, `vmsandbox gc --older-than 30` removes old records; {VARIABLE}=… "
            "sets another limit",
        )


def measure(layout: Layout) -> Usage:
    """Measure, and keep it for a while."""
    usage = usage_of(layout)
    with suppress(OSError):
        fresh = _file(layout).with_suffix(f".{os.getpid()}")
        fresh.write_text(json.dumps(asdict(usage)))
        fresh.replace(_file(layout))
    return usage


def make_room(layout: Layout) -> Iterator[Removed]:
    """Remove what may go while the limit is passed, the oldest first; stops as soon as it is not."""
    usage = measure(layout)
    limit = limit_of(layout, usage)
    over = usage.total - limit
    if over <= 0:
        return
    why = f"sessions and their records had {usage.total / 2**30:.1f} GiB of {limit / 2**30:.1f} GiB"
    for folder in prune(layout, most_bytes=max(usage.backups - over, 0)):
        yield Removed("backup", folder.parent.name, why)
    for record in _ended_records(layout, QUARANTINE_DAYS):
        usage = measure(layout)
        if usage.total <= limit:
            return
        if (record / QUARANTINE).is_dir():
            with suppress(OSError):
                shutil.rmtree(put_aside(record / QUARANTINE))
                yield Removed(QUARANTINE, record.name, f"{why}, and it ended more than {QUARANTINE_DAYS} days ago")
    measure(layout)


def remove_old_records(layout: Layout, days: float) -> Iterator[Removed]:
    """Remove the records of sessions that ended so long ago: journals, quarantines, backups."""
    for record in _ended_records(layout, days):
        with suppress(OSError):
            shutil.rmtree(put_aside(record))
            yield Removed("record", record.name, f"nothing was written into it for {days:g} days")


def _ended_records(layout: Layout, days: float) -> Iterator[Path]:
    """Records whose journal has not been written to for so long, the oldest first; never a live session's."""
    records = sorted(layout.records.glob("[!.]*/events.jsonl"))
    alive = set()
    for folder in live_sessions(layout):
        try:
            alive.add(folder.info().id)
        except VmsandboxError:
            return  # whose record is whose cannot be told
    for journal in records:
        with suppress(OSError):
            if journal.parent.name not in alive and time.time() - journal.stat().st_mtime > days * _DAY:
                yield journal.parent


def _kind(within: str, words: tuple[str, ...]) -> str:
    if within == "guests":
        return "snapshots" if len(words) > 1 and words[1] == "snapshots" else "guests"
    part = words[1].removeprefix(GONE) if len(words) > 1 else ""
    if part.lstrip(".").startswith(BACKUP):
        return "backups"
    return QUARANTINE if part.startswith(QUARANTINE) else "records"


def _file(layout: Layout) -> Path:
    return layout.ledger.with_name("usage.json")


def _measured(layout: Layout) -> Usage | None:
    with suppress(OSError, ValueError, TypeError):
        # An age below zero: the clock was set back.
        if 0 <= time.time() - _file(layout).stat().st_mtime < _GOOD_FOR:
            return Usage(**json.loads(_file(layout).read_text()))
    return None
