"""What `gc` does by the ledger: by identity, also where a session's folder is lost, and nothing that somebody owns."""

from __future__ import annotations

import dataclasses
import fcntl
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from test_session_folder import info_of

from vmsandbox.hypervisor.connection import Host, Running
from vmsandbox.ledger.book import Kind, Ledger
from vmsandbox.ledger.processes import Process
from vmsandbox.paths import Layout
from vmsandbox.session.gc import collect_garbage
from vmsandbox.session.resources.orphans import orphans
from vmsandbox.session.resources.renewal import renew_ledger
from vmsandbox.session.state.folder import SessionFolder
from vmsandbox.session.state.info import SessionInfo

FORK = multiprocessing.get_context("fork")
UUID = "11111111-2222-4333-8444-555555555555"
OTHER = "99999999-2222-4333-8444-666666666666"


@pytest.fixture
def layout(short_home: Path) -> Layout:
    layout = Layout.from_environment({"VMSANDBOX_HOME": str(short_home)})
    for folder in (layout.live, layout.run, layout.templates, layout.images):
        folder.mkdir(parents=True)
    return layout


@pytest.fixture
def host() -> Iterator[Host]:
    """libvirt's own test driver: real calls, no guests of ours."""
    host = Host.open("test:///default")
    yield host
    host.close()


@pytest.fixture
def process() -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    started: list[subprocess.Popen[bytes]] = []

    def start(*words: str) -> subprocess.Popen[bytes]:
        script = "import sys, time; print(flush=True); time.sleep(100)"
        child = subprocess.Popen(
            [words[0] if words else "other", "-c", script, *words[1:]],
            executable=sys.executable, stdout=subprocess.PIPE,
        )  # fmt: skip
        started.append(child)
        assert child.stdout is not None and child.stdout.readline()
        return child

    yield start
    for child in started:
        child.kill()
        child.wait()


def by_another(work: Callable[[], object]) -> None:
    """Done by a process that is gone afterwards."""
    child = FORK.Process(target=work)
    child.start()
    child.join(30)
    assert child.exitcode == 0


def claimed(layout: Layout, name: str = "one", **fields: object) -> tuple[SessionFolder, SessionInfo]:
    """A kept session whose `start` has ended, with all that a session writes down."""
    info = info_of(name, owner_pid=0, owner_started=0, **fields)
    folder = SessionFolder(layout, name)

    def start() -> None:
        things = ((Kind.FOLDER, name), (Kind.DOMAIN, info.uuid), (Kind.SOCKETS, folder.sockets(info).name))
        Ledger.of(layout).plan(info.id, *things)
        folder.claim(info)
        folder.sockets(info).mkdir()

    by_another(start)
    return folder, info


def damage(layout: Layout) -> bytes:
    for end in ("", "-wal", "-shm"):
        layout.ledger.with_name(layout.ledger.name + end).unlink(missing_ok=True)
    layout.ledger.write_bytes(b"broken" * 1000)
    return b"broken" * 1000


def removed_by(layout: Layout, host: Host) -> list[tuple[str, str]]:
    found = collect_garbage(layout, host)
    assert not [one for one in found if one.problem], found
    return [(one.kind, one.what) for one in found]


def test_without_its_folder_a_sessions_guest_processes_and_sockets_are_found(
    layout: Layout, host: Host, process: Callable[..., subprocess.Popen[bytes]]
) -> None:
    folder, info = claimed(layout)
    qemu = process("qemu-system-of-a-test", "-uuid", info.uuid)
    keeper, stranger = process("keeper"), process("stranger")
    by_another(
        lambda: Ledger.of(layout).plan(
            info.id,
            (Kind.PROCESS, f"{Process.of(keeper.pid)} keeper"),
            (Kind.PROCESS, f"{dataclasses.replace(Process.of(stranger.pid), started=1)} watcher"),
        )
    )
    folder.pid_file(folder.info()).write_text(str(qemu.pid))
    assert removed_by(layout, host) == [], "it lives"
    sockets = folder.sockets(info)
    for path in folder.path.iterdir():
        path.unlink()
    folder.path.rmdir()
    (orphan,) = orphans(layout, Ledger.of(layout).rows())
    assert orphan.session == info.id
    assert [kind for kind, _ in removed_by(layout, host)] == ["process", "guest", "sockets"]
    assert qemu.wait(10) == -9 and keeper.wait(10) == -15
    assert stranger.poll() is None, "its number was used again"
    assert not sockets.exists() and Ledger.of(layout).rows() == []
    assert removed_by(layout, host) == []


def test_another_session_of_the_same_name_keeps_all_of_its_own(layout: Layout, host: Host) -> None:
    folder, first = claimed(layout)
    (folder.path / "session.json").unlink()
    folder.path.rmdir()
    _, second = claimed(layout, uuid=OTHER)
    qemu = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)", OTHER])
    try:
        while not Path(f"/proc/{qemu.pid}/cmdline").read_bytes():
            time.sleep(0.01)
        folder.pid_file(folder.info()).write_text(str(qemu.pid))
        assert removed_by(layout, host) == [("sockets", f"{first.id}: {folder.sockets(first).name}")]
        assert folder.info().id == second.id and folder.sockets(second).is_dir() and qemu.poll() is None
        assert {row.session for row in Ledger.of(layout).rows()} == {second.id}
    finally:
        qemu.kill()
        qemu.wait()


def test_what_a_living_process_is_making_is_left_alone(layout: Layout, host: Host) -> None:
    making = layout.templates / f".making-{UUID}"
    run = layout.run / "t-11111111"
    staged = layout.live / f".two.{os.getpid()}.{Process.here().started}.abcd1234"
    things = ((Kind.DOMAIN, UUID), (Kind.SOCKETS, run.name), (Kind.FOLDER, "two"))
    Ledger.of(layout).plan("in the making", *things)
    run.mkdir()
    staged.mkdir()
    assert removed_by(layout, host) == []
    assert run.exists() and staged.exists()
    by_another(lambda: Ledger.of(layout).plan(f"template:{making.name}", (Kind.TEMPLATE, making.name)))
    making.mkdir()
    dead = layout.live / f".three.{os.getpid()}.1.abcd1234"
    dead.mkdir()
    assert sorted(kind for kind, _ in removed_by(layout, host)) == ["session", "template"]
    assert not making.exists() and not dead.exists() and staged.exists()


def test_a_guest_that_a_killed_rollback_left_beside_the_sessions_own_is_ended(
    layout: Layout, host: Host, process: Callable[..., subprocess.Popen[bytes]]
) -> None:
    folder, info = claimed(layout)
    own, second = process("qemu-test", info.uuid), process("qemu-test", OTHER)
    folder.pid_file(folder.info()).write_text(str(own.pid))
    Ledger.of(layout).plan(info.id, (Kind.DOMAIN, OTHER))
    assert removed_by(layout, host) == [], "it is being made"
    by_another(lambda: Ledger.of(layout).plan(info.id, (Kind.DOMAIN, OTHER)))
    removed_by(layout, host)
    assert second.wait(10) == -9 and own.poll() is None and folder.path.exists()
    assert OTHER not in {row.identity for row in Ledger.of(layout).rows(info.id)}


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (Kind.SOCKETS, "../live"), (Kind.SOCKETS, "/etc"), (Kind.SOCKETS, ""), (Kind.SOCKETS, "one-1a2b3c/.."),
        (Kind.TEMPLATE, "0" * 32), (Kind.TEMPLATE, ".making-../../x"), (Kind.IMAGE, "base/3ce15f1fa58742f6"),
        (Kind.PROCESS, "1"), (Kind.DOMAIN, "test"), (Kind.NETWORK, "default"),
    ],
)  # fmt: skip
def test_a_row_that_no_program_of_ours_wrote_removes_nothing(layout: Layout, host: Host, kind: Kind, name: str) -> None:
    (layout.templates / ("0" * 32)).mkdir()
    (layout.templates / ("0" * 32) / "manifest.json").write_text("{}")
    (layout.images / "base/3ce15f1fa58742f6").mkdir(parents=True)
    by_another(lambda: Ledger.of(layout).plan("s", (kind, name)))
    before = {path for path in layout.live.parent.rglob("*") if "ledger" not in path.name}
    (problem,) = [one for one in collect_garbage(layout, host) if one.problem]
    assert "ledger's row" in problem.problem
    assert before <= set(layout.live.parent.rglob("*"))
    assert len(Ledger.of(layout).rows()) == 1, "the row stays"


def test_a_ledger_that_cannot_be_read_is_no_reason_to_remove(layout: Layout, host: Host) -> None:
    folder, info = claimed(layout)
    sockets, run = folder.sockets(info), layout.run / "two.net"
    run.mkdir()
    dead = SessionFolder(layout, "dead")
    dead.claim(info_of("dead", owner_pid=2**22 - 1, owner_started=1))
    (folder.path / "session.json").unlink()
    folder.path.rmdir()
    content = damage(layout)
    found = collect_garbage(layout, host)
    assert [(one.kind, bool(one.problem)) for one in found] == [("session", False), ("ledger", True)]
    assert "--new-ledger" in found[1].problem or "cannot be used" in found[1].problem
    assert sockets.exists() and run.exists() and not dead.path.exists()
    assert layout.ledger.read_bytes() == content


def test_a_new_ledger_knows_the_sessions_that_live(layout: Layout, host: Host) -> None:
    _, info = claimed(layout)
    before = {(row.kind, row.identity) for row in Ledger.of(layout).rows(info.id)}
    damage(layout)
    aside = renew_ledger(layout)
    assert aside.read_bytes().startswith(b"broken")
    assert before <= {(row.kind, row.identity) for row in Ledger.of(layout).rows(info.id)}


def test_two_at_once_remove_each_thing_once(layout: Layout) -> None:
    for number in range(6):
        folder, _ = claimed(layout, f"s{number}")
        (folder.path / "session.json").unlink()
        folder.path.rmdir()
    start, results = FORK.Barrier(3), FORK.Queue()

    def work() -> None:
        host = Host.open("test:///default")
        start.wait()
        found = collect_garbage(layout, host)
        results.put([(one.what, one.problem) for one in found])

    children = [FORK.Process(target=work) for _ in range(3)]
    for child in children:
        child.start()
    told = [one for _ in children for one in results.get(timeout=60)]
    for child in children:
        child.join(30)
    assert [child.exitcode for child in children] == [0] * 3
    assert len(told) == len(set(told)) == 6 and not [problem for _, problem in told if problem]
    assert Ledger.of(layout).rows() == [] and list(layout.run.iterdir()) == []


def test_a_second_gc_waits_for_the_first(layout: Layout) -> None:
    def work() -> None:
        collect_garbage(layout, Host.open("test:///default"))

    child = FORK.Process(target=work)
    with layout.ledger.with_name("gc.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        child.start()
        child.join(1)
        assert child.exitcode is None
        fcntl.flock(lock, fcntl.LOCK_UN)  # the child has this open file, too
    child.join(30)
    assert child.exitcode == 0


def test_a_session_between_two_guests_is_not_dead(layout: Layout, host: Host) -> None:
    """A rollback ends the first guest, and writes down the second one before it makes it."""
    folder, info = claimed(layout)
    Ledger.of(layout).plan(info.id, (Kind.DOMAIN, OTHER))
    assert removed_by(layout, host) == []
    Ledger.of(layout).gone(info.id, (Kind.DOMAIN, OTHER))
    assert removed_by(layout, host) == [("session", "one")]
    assert not folder.path.exists()


class _Starting(Host):
    """While guests are listed, a session begins: it has its folder, then its guest."""

    def __init__(self, real: Host, layout: Layout) -> None:
        super().__init__(real.uri, real._connection)
        self._layout = layout
        self.destroyed: list[str] = []

    def list_sessions(self, namespace: str) -> list[Running]:
        info = info_of("new", uuid=OTHER)
        SessionFolder(self._layout, "new").claim(info)
        home = str(self._layout.live)
        return [Running("vmsandbox-new-1a2b3c", OTHER, info.id, home), Running("vmsandbox-x-1a2b3c", UUID, "x", home)]

    def destroy(self, uuid: str) -> bool:
        self.destroyed.append(uuid)
        return True


def test_a_guest_that_begins_while_it_looks_is_left_alone(layout: Layout, host: Host) -> None:
    starting = _Starting(host, layout)
    assert removed_by(layout, starting) == [("guest", "vmsandbox-x-1a2b3c")]
    assert starting.destroyed == [UUID]


def test_a_guest_whose_record_is_damaged_is_left_for_a_person(layout: Layout, host: Host) -> None:
    class Found(_Starting):
        def list_sessions(self, namespace: str) -> list[Running]:
            home = str(self._layout.live)
            return [
                Running("vmsandbox-one-1a2b3c", UUID, "id", home),
                Running("vmsandbox-two-1a2b3c", OTHER, "id", home),
            ]

    folder, _ = claimed(layout)
    (folder.path / "session.json").write_text("{")
    found = Found(host, layout)
    problems = [one.what for one in collect_garbage(layout, found) if one.problem]
    assert problems == ["one"] and found.destroyed == [OTHER] and folder.path.exists()
