"""All sessions together have a limit on the host's disk; what `gc` removes for it is what can be spared."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
from test_session_folder import info_of

from vmsandbox.errors import HostError, UserInputError
from vmsandbox.paths import Layout
from vmsandbox.session.records.unfinished import parts_in_records
from vmsandbox.session.resources.quotas import (
    VARIABLE,
    Usage,
    check_quota,
    limit_of,
    make_room,
    measure,
    remove_old_records,
    usage_of,
)
from vmsandbox.session.state.folder import SessionFolder

MIB = 1 << 20
OLD = 40 * 86400


@pytest.fixture
def layout(short_home: Path) -> Layout:
    short_home.mkdir()
    return Layout.from_environment({"VMSANDBOX_HOME": str(short_home)})


def record(layout: Layout, name: str, age: float = 0, *, quarantine: int = 0, backup: int = 0) -> Path:
    folder = layout.records / name
    folder.mkdir(parents=True)
    if quarantine:
        (folder / "quarantine/blobs").mkdir(parents=True)
        (folder / "quarantine/blobs/x").write_bytes(os.urandom(quarantine * MIB))
    if backup:
        (folder / "backup").mkdir()
        (folder / "backup/all.bundle").write_bytes(os.urandom(backup * MIB))
        details = {"project": "/p", "created": "", "deleted": [], "unreadable": []}
        (folder / "backup/backup.json").write_text(json.dumps(details))
    (folder / "events.jsonl").write_text("{}\n")
    os.utime(folder / "events.jsonl", (time.time() - age, time.time() - age))
    return folder


def test_what_is_where_is_told_apart_and_counted_once(layout: Layout) -> None:
    first, second = record(layout, "a", backup=3), record(layout, "b", quarantine=2)
    (second / "backup").mkdir()
    (second / "backup/all.bundle").hardlink_to(first / "backup/all.bundle")
    (layout.live / "one/vm").mkdir(parents=True)
    (layout.live / "one/vm/disk.qcow2").write_bytes(os.urandom(MIB))
    os.truncate(layout.live / "one/vm/disk.qcow2", 100 * MIB)
    (layout.live / "one/snapshots/t").mkdir(parents=True)
    (layout.live / "one/snapshots/t/ram").write_bytes(os.urandom(4 * MIB))
    usage = usage_of(layout)
    assert [round(size / MIB) for size in (usage.guests, usage.snapshots, usage.backups, usage.quarantine)] == [
        1,
        4,
        3,
        2,
    ]
    assert "snapshots 0.0 GiB" in usage.text()


def test_what_was_being_removed_is_counted_and_goes_also_of_a_live_session(layout: Layout) -> None:
    live = info_of("one")
    SessionFolder(layout, "one").claim(live)
    folder = record(layout, live.id, backup=2)
    (folder / "backup").rename(folder / ".gone-backup.0a")
    (folder / ".backup").mkdir()  # its own session makes it at this moment
    record(layout, ".gone-old.0b", OLD)
    assert usage_of(layout).backups >= 2 * MIB
    assert list(remove_old_records(layout, 1)) == [], "it is being removed already"
    assert [part.what for part in parts_in_records(layout)] == [".gone-old.0b", f"{live.id}/.gone-backup.0a"]
    assert sorted(path.name for path in folder.iterdir()) == [".backup", "events.jsonl"]


def test_the_limit_is_the_variables_else_a_share_of_the_disk(layout: Layout) -> None:
    assert limit_of(layout, Usage(), {VARIABLE: "2G"}) == 2 << 30
    layout.live.mkdir(parents=True)
    disk = os.statvfs(layout.live)
    default = limit_of(layout, Usage(), {})
    assert default == 50 << 30 or abs(default - 0.8 * disk.f_bavail * disk.f_frsize) < 1 << 30
    with pytest.raises(UserInputError, match="VMSANDBOX_QUOTA=much"):
        limit_of(layout, Usage(), {VARIABLE: "much"})


def test_over_the_limit_nothing_more_starts(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "5m")
    check_quota(layout)
    record(layout, "a", quarantine=6)
    check_quota(layout)  # measured a moment ago
    measure(layout)
    with pytest.raises(HostError, match="more of the disk than they may") as failure:
        check_quota(layout)
    assert "quarantine" in failure.value.details and "gc" in failure.value.resolution
    (layout.records / "a/quarantine/blobs/x").unlink()
    check_quota(layout)  # at the limit it is measured anew


def test_room_is_made_of_what_can_be_spared(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "10m")
    oldest = record(layout, "20250101-a", OLD, backup=3, quarantine=3)
    middle = record(layout, "20250102-b", OLD - 60, backup=3, quarantine=3)
    newest = record(layout, "20250103-c", 0, backup=3, quarantine=3)
    removed = [(one.kind, one.what) for one in make_room(layout)]
    assert removed[:2] == [("backup", oldest.name), ("backup", middle.name)]
    assert (newest / "backup").is_dir(), "the newest of a project stays"
    assert removed[2:] == [("quarantine", oldest.name)], "no more than is needed"
    assert (newest / "quarantine").is_dir() and (oldest / "events.jsonl").exists()
    assert list(make_room(layout)) == []


def test_what_came_back_lately_stays_whatever_the_limit(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "1m")
    fresh = record(layout, "a", 29 * 86400, quarantine=3)
    assert list(make_room(layout)) == []
    assert (fresh / "quarantine/blobs/x").exists()


def test_old_records_go_when_asked_for_and_never_a_live_sessions(layout: Layout) -> None:
    live = info_of("one")
    SessionFolder(layout, "one").claim(live)
    record(layout, live.id, OLD)
    record(layout, "old", OLD)
    record(layout, "young", 10)
    assert [one.what for one in remove_old_records(layout, 30)] == ["old"]
    assert sorted(path.name for path in layout.records.iterdir()) == sorted([live.id, "young"])
    (SessionFolder(layout, "one").path / "session.json").write_text("{")
    record(layout, "old", OLD)
    assert list(remove_old_records(layout, 30)) == [], "whose record is whose cannot be told"
