"""An append-only events file in which each record carries the hash of the one before.

Only the host writes it. A changed, missing, reordered or doubled record breaks the chain, and `verify` names the
first bad one. (A cut-off tail shows only once the end is signed; until then `session.closed` marks the end.)

One record per line, JSON with sorted keys:
`{"data": {...}, "hash": sha256, "kind": str, "prev": sha256, "seq": n, "time": RFC 3339 UTC}`
where `hash` is the SHA-256 of the record's own canonical JSON without `hash`, in lower-case hexadecimal.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from vmsandbox.errors import JournalError
from vmsandbox.journal.events import Event

GENESIS = "0" * 64
_TAIL = 1 << 20  # bytes read to find the last record; `_bounded` keeps a record far below


class Journal:
    """Appends events to one file. Several processes may append at once (each holds a lock for one record)."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, event: Event) -> str:
        """Write one event and return its hash.

        Raises:
            JournalError: the file cannot be written, or its last record is damaged.
        """
        try:
            fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise JournalError(f"the journal cannot be written: {self.path}", details=str(error)) from error
        with os.fdopen(fd, "r+b", buffering=0) as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            last = _last_record(file.fileno(), self.path)
            record: dict[str, Any] = {
                "seq": last["seq"] + 1 if last else 0,
                "prev": last["hash"] if last else GENESIS,
                "time": datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z"),
                "kind": event.kind,
                "data": _bounded(event.data()),
            }
            record["hash"] = record_hash(record)
            line = _canonical(record) + b"\n"
            size = os.fstat(file.fileno()).st_size
            try:
                if os.write(file.fileno(), line) != len(line):
                    os.ftruncate(file.fileno(), size)  # else nothing could ever be appended again
                    raise OSError("there was room for a part of the record only")
            except OSError as error:
                raise JournalError(
                    f"the journal cannot be written: {self.path}",
                    details=str(error),
                    resolution="make room on its file system",
                ) from error
        return str(record["hash"])

    def read(self) -> list[dict[str, Any]]:
        """All records, checked. Raises JournalError for the first bad one."""
        return list(verified_records(self.path))


def verified_records(path: Path) -> Iterator[dict[str, Any]]:
    """Yield each record of a journal after checking it against the chain.

    Raises:
        JournalError: names the first record (counted from 0) that is not what was written.
    """
    prev = GENESIS
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise JournalError(f"the journal cannot be read: {path}", details=str(error)) from error
    for number, line in enumerate(lines):
        try:
            record = json.loads(line)
            good = record["seq"] == number and record["prev"] == prev and record["hash"] == record_hash(record)
        except (ValueError, KeyError, TypeError):
            good = False
        if not good:
            raise JournalError(
                f"record {number} of the journal is not what was written",
                details=str(path),
                resolution="treat this record and all after it as unproven",
            )
        prev = record["hash"]
        yield record


def record_hash(record: dict[str, Any]) -> str:
    """SHA-256 of a record's canonical JSON, its own `hash` left out."""
    return hashlib.sha256(_canonical({k: v for k, v in record.items() if k != "hash"})).hexdigest()


def _canonical(record: dict[str, Any]) -> bytes:
    return json.dumps(record, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()


def _last_record(fd: int, path: Path) -> dict[str, Any] | None:
    size = os.fstat(fd).st_size
    if size == 0:
        return None
    tail = os.pread(fd, _TAIL, max(0, size - _TAIL))
    try:
        if not tail.endswith(b"\n"):
            raise ValueError("the last record is cut off")
        record = json.loads(tail.rstrip(b"\n").rsplit(b"\n", 1)[-1])
        if record["hash"] != record_hash(record):
            raise ValueError("the last record was changed")
    except (ValueError, KeyError, TypeError) as error:
        raise JournalError(
            f"the journal is damaged: {path}",
            details=str(error),
            resolution="keep the file as evidence; `vmsandbox logs` shows the records that are still good",
        ) from error
    assert isinstance(record, dict)
    return record


def _bounded(value: Any, room: int = 2000) -> Any:
    """Cut long strings and lists: a guest's words must not fill the host's disk through the journal."""
    if isinstance(value, str):
        cut = value.encode("utf-8", "backslashreplace").decode()
        return cut if len(cut) <= room else cut[:room] + f"… ({len(cut)} characters)"
    if isinstance(value, (list, tuple)):
        kept = [_bounded(item, 500) for item in value[:32]]
        return kept if len(value) <= 32 else [*kept, f"… ({len(value)} items)"]
    if isinstance(value, dict):
        return {str(key)[:100]: _bounded(item, 500) for key, item in list(value.items())[:64]}
    return value
