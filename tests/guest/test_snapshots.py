"""Snapshots of real guests: what they keep, what a rollback brings back, what is left when either is killed."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from harness import Cli, Guest, ended, make_tree, nothing_more, wait_for

from vmsandbox.errors import HostError
from vmsandbox.failpoints import switched_on
from vmsandbox.hypervisor import snapshot as snapshot_module
from vmsandbox.hypervisor.connection import Host
from vmsandbox.ledger.admission import reservations
from vmsandbox.ledger.book import Ledger
from vmsandbox.ledger.processes import Process
from vmsandbox.process import Programs
from vmsandbox.session.rewind.rollback import roll_back
from vmsandbox.session.rewind.snapshots import take_snapshot
from vmsandbox.session.sandbox import Sandbox
from vmsandbox.session.state.guestlock import guest_locked
from vmsandbox.session.upkeep.freezing import freeze_guest

FILES = {"kept.txt": "as pushed\n", "gone.txt": "as pushed\n"}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tree(tmp_path_factory.mktemp("projects") / "snapped", FILES)


@pytest.fixture(scope="module")
def snapped(cli: Cli, project: Path) -> Iterator[Guest]:
    """A guest with two snapshots: `start`, and `work`, in which a file was changed and a process runs."""
    cli("start", project, "--name", "snapped")
    guest = cli.guest("snapped")
    guest.sh("echo changed > kept.txt; rm gone.txt; echo mine > ~/home.txt; sleep 4711 > /dev/null 2>&1 &")
    cli("snapshot", "snapped", "work")
    yield guest
    guest.stop()


@pytest.fixture(autouse=True)
def nothing_left(cli: Cli) -> Iterator[None]:
    with nothing_more(cli.home):
        yield


def changes_of(guest: Guest) -> tuple[list[str], list[str], list[str]]:
    """Paths that were modified, deleted and added, as the host sees it."""
    document = guest.cli.json("changes", guest.name)
    modified, deleted, added = ([row["path"] for row in document[kind]] for kind in ("modified", "deleted", "added"))
    return modified, deleted, added


def state_of(guest: Guest) -> str:
    """As libvirt says: "running", "paused" …"""
    return subprocess.run(["virsh", "-q", "domstate", guest.info.uuid], capture_output=True, text=True).stdout.strip()


def rollbacks_of(guest: Guest) -> list[str]:
    """The UUIDs of the guests that they brought, by the journal."""
    entries = guest.folder.journal(guest.info.id).read()
    return [entry["data"]["uuid"] for entry in entries if entry["kind"] == "session.rolledback"]


def random_bytes(guest: Guest) -> str:
    return guest.sh("head -c 32 /dev/urandom | sha256sum")


def domains(cli: Cli, session: str) -> list[str]:
    with closing(Host.open()) as host:
        return [one.uuid for one in host.list_sessions("https://vmsandbox.dev/xmlns/session/1") if session in one.name]


def test_a_snapshot_has_memory_disk_and_what_the_host_knew(snapped: Guest) -> None:
    snapped.sh("rm -rf ~/home.txt kept.txt; pkill sleep; true")
    before = snapped.info
    running = snapped.cli.start("exec", "snapped", "--", "sleep", "600")
    wait_for(lambda: snapped.folder.path.joinpath("port.0").exists())
    time.sleep(2)  # it has logged in
    snapped.cli("rollback", "snapped", "work")
    assert ended(running)[0] != 0, "a connection to the guest that is gone ends"
    assert snapped.sh("cat kept.txt ~/home.txt; ls; pgrep -x sleep | wc -l") == "changed\nmine\nkept.txt\n1"
    first, machine = random_bytes(snapped), snapped.sh("cat /etc/machine-id")
    assert abs(float(snapped.sh("date +%s.%N")) - time.time()) < 30, "the clock is not the snapshot's"
    assert changes_of(snapped) == (["kept.txt"], ["gone.txt"], [])
    snapped.cli("rollback", "snapped")
    assert snapped.sh("cat kept.txt gone.txt; ls ~; pgrep -x sleep | wc -l") == "as pushed\nas pushed\nprojects\n0"
    assert changes_of(snapped) == ([], [], [])
    snapped.cli("rollback", "snapped", "work")
    assert random_bytes(snapped) != first, "two guests from one snapshot have the same random state"
    after = snapped.info
    assert snapped.sh("cat /etc/machine-id") == machine and after.id == before.id and after.uuid != before.uuid
    assert domains(snapped.cli, "snapped") == [after.uuid]
    assert [path.name for path in snapped.folder.path.glob("vm-*")] == [f"vm-{after.uuid[-6:]}"]


def test_stock_ssh_goes_on_with_the_keys_that_it_knows(snapped: Guest, tmp_path: Path) -> None:
    config = tmp_path / "config"
    config.write_bytes(snapped.cli("ssh-config", "snapped").stdout)
    snapped.cli("rollback", "snapped", "work")
    argv = ["ssh", "-F", config, "vmsandbox-snapped", "cat ~/home.txt"]
    done = subprocess.run(argv, capture_output=True, timeout=90, env=snapped.cli.environment)
    assert (done.returncode, done.stdout) == (0, b"mine\n"), done.stderr


def test_sessions_begin_as_a_snapshot_and_share_nothing_that_is_theirs(snapped: Guest) -> None:
    cli = snapped.cli
    try:
        for name in ("first", "second"):
            cli("start", "--from", "snapped:work", "--no-snapshot", "--name", name)
        first, second = cli.guest("first"), cli.guest("second")
        for guest in (first, second):
            assert (
                guest.sh("cat kept.txt ~/home.txt; hostname; pgrep -x sleep | wc -l")
                == f"changed\nmine\n{guest.name}\n1"
            )
        three = (first, second, snapped)
        assert len({guest.sh("cat /etc/machine-id") for guest in three}) == 3
        assert len({guest.folder.keys().host_key for guest in three}) == 3
        assert len({guest.folder.keys().user_key for guest in three}) == 3
        assert random_bytes(first) != random_bytes(second)
        first.sh("echo first > kept.txt")
        assert second.sh("cat kept.txt") == "changed"
        assert changes_of(first) == (["kept.txt"], ["gone.txt"], [])
        asked = cli("start", "--from", "snapped:work", "--policy", "offline", "--name", "other", status=126)
        assert b"taken under something else" in asked.stderr
    finally:
        cli("stop", "first", "second", status=None)


def test_the_list_is_a_tree_and_a_removal_gives_the_space_back(snapped: Guest) -> None:
    cli = snapped.cli
    taken = cli.json("snapshot", "snapped", "leaf")
    rows = {row["tag"]: row for row in cli.json("snapshots", "snapped")}
    assert rows["start"]["parent"] is None and rows["work"]["parent"] == "start" and rows["leaf"]["parent"] == "work"
    assert rows["leaf"] == taken and taken["pause"] < 5
    on_disk = sum(path.stat().st_blocks * 512 for path in (snapped.folder.snapshots / "leaf").iterdir())
    assert abs(on_disk - taken["bytes"]) < 1 << 20
    text = cli("snapshots", "snapped").stdout.decode()
    assert [line.split("20")[0].rstrip() for line in text.splitlines()[1:]] == ["start", "  work", "    leaf"]
    cli("snapshots", "snapped", "--remove", "leaf")
    assert not (snapped.folder.snapshots / "leaf").exists()
    assert b"no snapshot 'leaf'" in cli("rollback", "snapped", "leaf", status=125).stderr
    assert b"has a snapshot 'work' already" in cli("snapshot", "snapped", "work", status=125).stderr
    assert b"not a snapshot's name" in cli("snapshot", "snapped", "../up", status=125).stderr


@pytest.mark.parametrize("name", ["ram", "disk.qcow2", "state", "manifest.json"])
def test_one_changed_byte_is_refused_and_the_session_goes_on(snapped: Guest, name: str) -> None:
    path = snapped.folder.snapshots / "work" / name
    whole, mode = path.read_bytes() if name != "ram" else b"", path.stat().st_mode
    path.chmod(0o600)
    with path.open("r+b") as file:
        file.seek(4096 if name != "manifest.json" else 0)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes((byte[0] ^ 1,)))
    before = snapped.info
    try:
        done = snapped.cli("rollback", "snapped", "work", status=125)
        assert b"was changed" in done.stderr or b"cannot be read" in done.stderr
        assert snapped.info == before and snapped.sh("echo alive") == "alive"
    finally:
        with path.open("r+b") as file:
            if name == "ram":
                file.seek(4096)
                file.write(byte)
            else:
                file.write(whole)
        path.chmod(mode)
    snapped.cli("rollback", "snapped", "work", "--verify")


@pytest.mark.parametrize("place", ["snapshot.memory", "snapshot.disk", "snapshot.digests", "snapshot.published"])
def test_a_snapshot_that_is_killed_leaves_a_guest_that_runs(snapped: Guest, place: str) -> None:
    killed = Cli(snapped.cli.home, {"VMSANDBOX_FAILPOINT": f"{place}=kill"})
    killed("snapshot", "snapped", "killed", status=-9)
    snapped.cli("gc")
    assert snapped.sh("echo alive") == "alive"
    tags = {row["tag"] for row in snapped.cli.json("snapshots", "snapped")}
    assert tags == {"start", "work"} | ({"killed"} if place == "snapshot.published" else set())
    assert not list(snapped.folder.snapshots.glob(".[tg]*"))
    if "killed" in tags:
        snapped.cli("snapshots", "snapped", "--remove", "killed")


@pytest.mark.parametrize(
    ("place", "is_done"),
    [("rollback.written", False), ("rollback.started", False), ("rollback.ready", False),
     ("rollback.committed", True), ("rollback.restored", True), ("rollback.ended", True)],
)  # fmt: skip
def test_a_rollback_that_is_killed_is_undone_or_finished(snapped: Guest, place: str, is_done: bool) -> None:
    snapped.sh("echo later > kept.txt; echo later > later.txt")
    before, told = snapped.info.uuid, rollbacks_of(snapped)
    killed = Cli(snapped.cli.home, {"VMSANDBOX_FAILPOINT": f"{place}=kill"})
    killed("rollback", "snapped", "work", status=-9)
    snapped.cli("gc")
    assert (snapped.info.uuid != before) == is_done
    assert snapped.sh("cat kept.txt; ls") == ("changed\nkept.txt" if is_done else "later\nkept.txt\nlater.txt")
    assert not (snapped.folder.path / "next.json").exists()
    assert [path.name for path in snapped.folder.path.glob("vm-*")] == [f"vm-{snapped.info.uuid[-6:]}"]
    assert rollbacks_of(snapped) == [*told, *([snapped.info.uuid] if is_done else [])]


def test_whoever_comes_first_finishes_a_rollback_that_was_killed(snapped: Guest) -> None:
    snapped.cli("snapshot", "snapped", "short")
    killed = Cli(snapped.cli.home, {"VMSANDBOX_FAILPOINT": "rollback.committed=kill"})
    killed("rollback", "snapped", "short", status=-9)
    snapped.cli("snapshots", "snapped", "--remove", "short")
    assert not (snapped.folder.path / "next.json").exists()
    snapped.cli("gc")
    assert changes_of(snapped) == (["kept.txt"], ["gone.txt"], []), "what the host knows of the guest is still there"


def test_a_push_goes_on_with_the_guest_that_a_rollback_brought(snapped: Guest, project: Path) -> None:
    sandbox = Sandbox.attach("snapped", layout=snapped.cli.layout)
    before = sandbox.info.uuid
    snapped.cli("rollback", "snapped", "work")
    sandbox.push(project)
    sandbox.disconnect()
    assert snapped.info.uuid == sandbox.info.uuid != before
    assert snapped.sh("cat gone.txt") == "as pushed"
    snapped.cli("rollback", "snapped", "work")


def test_a_session_that_ends_while_it_is_rolled_back_leaves_nothing(cli: Cli) -> None:
    for place in ("rollback.written", "fork.folders", "rollback.started", "rollback.restored"):
        cli("start", "--empty", "--name", "both")
        slow = Cli(cli.home, {"VMSANDBOX_FAILPOINT": f"{place}=pause:3"})
        rollback = slow.start("rollback", "both")
        wait_for(lambda: (cli.layout.live / "both/next.json").exists())
        cli("stop", "both")
        status, _, stderr = ended(rollback)
        assert b"Traceback" not in stderr and status in (0, 125), stderr
        assert not (cli.layout.live / "both").exists()
        wait_for(lambda: domains(cli, "both") == [], timeout=20)  # libvirt notices late where PID 1 reaps late


def test_a_guest_that_is_frozen_while_a_snapshot_is_taken_stays_so(snapped: Guest) -> None:
    def freeze(name: str) -> None:
        if name == "snapshot.memory":
            freeze_guest(snapped.folder, snapped.info, by="broker", reason="a test")

    try:
        with switched_on(freeze):
            take_snapshot(Sandbox.attach("snapped", layout=snapped.cli.layout), "icy")
        assert state_of(snapped) == "paused"
        snapped.cli("thaw", "snapped")
        assert snapped.sh("echo alive") == "alive"
    finally:
        snapped.cli("snapshots", "snapped", "--remove", "icy")


def test_a_guest_is_frozen_though_it_cannot_be_written_down(snapped: Guest) -> None:
    mark = snapped.folder.path / "frozen"
    mark.mkdir()
    freeze_guest(snapped.folder, snapped.info, by="broker", reason="a test")
    assert state_of(snapped) == "paused"
    mark.rmdir()
    subprocess.run(["virsh", "-q", "resume", snapped.info.uuid], capture_output=True)
    assert snapped.sh("echo alive") == "alive"


def test_one_run_at_a_time_in_a_guest_that_stays(cli: Cli) -> None:
    words = ("session", "--empty", "--rollback", "--name", "busy", "--", "sh", "-c")
    try:
        cli(*words, "true")
        first = cli.start(*words, "echo begun; sleep 5; echo done")
        assert first.stdout is not None and first.stdout.readline() == b"begun\n"
        assert b"at this moment" in cli(*words, "true", status=125).stderr
        assert ended(first)[:2] == (0, b"done\n")
    finally:
        cli("stop", "busy", status=None)


def test_a_guest_that_stays_is_nobody_elses_before_it_is_ready(cli: Cli, tmp_path: Path) -> None:
    words, flag = ("session", "--empty", "--rollback", "--name", "young", "--", "echo", "done"), tmp_path / "flag"
    try:
        waiting = Cli(cli.home, {"VMSANDBOX_FAILPOINT": f"snapshot.memory=tell:{flag}"})
        first = waiting.start(*words)
        wait_for(flag.exists, 60)
        assert b"still starting" in cli(*words, status=125).stderr
        flag.unlink()
        assert ended(first)[:2] == (0, b"done\n")
    finally:
        cli("stop", "young", status=None)


def test_a_rollback_that_fails_leaves_the_session_as_it_was(snapped: Guest) -> None:
    before = snapped.info
    snapped.sh("echo precious > precious.txt")
    for place, action in (("rollback.started", "eio"), ("rollback.ready", "interrupt")):
        failing = Cli(snapped.cli.home, {"VMSANDBOX_FAILPOINT": f"{place}={action}"})
        assert failing("rollback", "snapped", "work", status=None).returncode in (125, 130)
        assert snapped.info == before and snapped.sh("cat precious.txt") == "precious"
        assert domains(snapped.cli, "snapped") == [before.uuid]


def test_a_guest_goes_on_though_the_connection_to_libvirt_broke_while_it_stood_still(
    snapped: Guest, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[Host] = []
    real = Host.open

    def recorded() -> Host:
        opened.append(real())
        return opened[-1]

    def gone(*_: object) -> None:
        raise HostError("the connection is gone")

    def cut(name: str) -> None:
        if name == "snapshot.disk":
            for call in ("qmp", "resume"):
                monkeypatch.setattr(opened[-1], call, gone)

    monkeypatch.setattr(Host, "open", recorded)
    with switched_on(cut), pytest.raises(HostError, match="connection is gone"):
        take_snapshot(Sandbox.attach("snapped", layout=snapped.cli.layout), "cut")
    assert snapped.sh("echo alive") == "alive"
    assert not list(snapped.folder.snapshots.glob(".taking-*"))
    assert {row["tag"] for row in snapped.cli.json("snapshots", "snapped")} == {"start", "work"}


def test_the_guest_that_a_rollback_brings_is_not_frozen(snapped: Guest) -> None:
    freeze_guest(snapped.folder, snapped.info, by="broker", reason="a test")
    snapped.cli("rollback", "snapped", "work")
    (row,) = [one for one in snapped.cli.json("ls") if one["name"] == "snapped"]
    assert row["state"] == "running" and snapped.sh("cat kept.txt") == "changed"


def test_a_rollback_without_room_for_a_second_guest_is_refused(snapped: Guest) -> None:
    ledger, before = Ledger.of(snapped.cli.layout), snapped.info
    with ledger.transaction() as connection:
        values = ("somebody", "somebody", 1 << 40, 0, str(Process.here()), "2026")
        connection.execute("INSERT OR REPLACE INTO reservations VALUES (?, ?, ?, ?, ?, ?)", values)
    try:
        refused = snapped.cli("rollback", "snapped", status=125)
    finally:
        with ledger.transaction() as connection:
            connection.execute("DELETE FROM reservations WHERE owner = 'somebody'")
    assert b"no room now for the guest that would take the place" in refused.stderr
    assert b"reserved by somebody" in refused.stderr
    assert snapped.info == before and snapped.sh("echo alive") == "alive"
    snapped.cli("rollback", "snapped", "work")
    labels = [one.label for one in reservations(ledger)]
    assert "snapped" in labels and "snapped, rolled back" not in labels, "the second guest's is given back"


def test_without_the_right_to_look_into_qemu_the_stream_does(snapped: Guest, monkeypatch: pytest.MonkeyPatch) -> None:
    class Denied:
        def __init__(self, *_: object) -> None:
            raise PermissionError

    monkeypatch.setattr(snapshot_module, "GuestMemory", Denied)
    sandbox = Sandbox.attach("snapped", layout=snapped.cli.layout)
    snapped.sh("echo streamed > kept.txt")
    take_snapshot(sandbox, "streamed")
    snapped.sh("echo after > kept.txt")
    roll_back(sandbox, "streamed", Programs())
    assert snapped.sh("cat kept.txt; find /usr/lib -type f | head -2000 | xargs cat | wc -c").startswith("streamed\n")
    snapped.cli("snapshots", "snapped", "--remove", "streamed")


def test_what_runs_a_command_again_and_again_finds_the_guest_as_it_was(cli: Cli, project: Path) -> None:
    try:
        words = ("session", project, "--rollback", "--name", "nightly", "--json", "--", "sh", "-c")
        for round_ in range(2):
            script = 'test ! -e ~/left && touch ~/left && echo "$0" > new.txt'
            report = json.loads(cli(*words[:6], *words[6:], script, str(round_)).stdout)
            assert [one["path"] for one in report["changes"]["added"]] == ["new.txt"], report
        assert cli.guest("nightly").sh("ls ~; ls") == "projects\ngone.txt\nkept.txt"
        refused = cli(*words[:5], "--policy", "offline", "--", "true", status=126)
        assert b"something else than is asked for" in refused.stderr
    finally:
        cli("stop", "nightly", status=None)


def test_what_a_rolled_back_guest_made_is_compared_with_what_it_was_given(cli: Cli, tmp_path: Path) -> None:
    project = make_tree(tmp_path / "again", FILES)
    words = ("session", project, "--rollback", "--name", "again", "--json")
    try:
        cli(*words, "--", "true")
        (project / "kept.txt").write_text("its owner's\n")  # after the start to which the guest goes back
        report = json.loads(cli(*words, "--accept", "all", "--", "sh", "-c", "echo 1 > first.txt").stdout)
        assert report["applied"] == ["first.txt"] and not report["changes"]["modified"], report["changes"]
        left = json.loads(cli(*words, "--", "sh", "-c", "echo 2 > second.txt; echo 2 > first.txt").stdout)
        assert left["applied"] == [] and len(left["changes"]["added"]) == len(left["changes"]["modified"]) == 1
        # Later, when the guest has long been another.
        assert cli.json("accept", left["id"], "first.txt")["applied"] == ["first.txt"]
        assert cli.json("accept", left["id"], "--all")["applied"] == ["second.txt"]
        assert cli.json("changes", left["id"])["review"] == []
        names = ("first.txt", "kept.txt", "second.txt")
        assert [(project / name).read_text() for name in names] == ["2\n", "its owner's\n", "2\n"]
        assert changes_of(cli.guest("again")) == ([], [], []), "of the guest as it is now"
    finally:
        cli("stop", "again", status=None)


def test_nothing_is_copied_in_while_a_snapshot_is_taken(snapped: Guest, project: Path) -> None:
    pushed = snapped.folder.record_folder(snapped.folder.info().id) / "pushed.jsonl"
    before = pushed.stat().st_mtime_ns
    with guest_locked(snapped.folder):
        push = snapped.cli.start("push", "snapped", project)
        time.sleep(3)
        assert push.poll() is None and pushed.stat().st_mtime_ns == before
    assert ended(push)[0] == 0 and pushed.stat().st_mtime_ns > before
