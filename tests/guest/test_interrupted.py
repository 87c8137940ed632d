"""Ctrl-C, SIGTERM and kill -9 at every stage: the status says it, and nothing stays (for kill -9: after `gc`)."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from harness import Cli, Guest, ended, leftovers, make_tree, wait_for

from vmsandbox.hypervisor.connection import Host
from vmsandbox.hypervisor.making import in_the_making
from vmsandbox.hypervisor.template import TemplateStore
from vmsandbox.ledger.processes import processes_of
from vmsandbox.session.state.folder import SessionFolder
from vmsandbox.session.state.guestlock import guest_locked
from vmsandbox.spec import Accelerator, GuestShape

STAGES = {
    "template": b"making template",
    "fork": b"starting guest",
    "push": b"copying",
    "command": b"now",
    "return": b"fetching",
}


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project that takes a while to go in."""
    root = tmp_path_factory.mktemp("big") / "big"
    root.mkdir()
    make_tree(root.parent / "small", {"a": "b"})
    for number in range(4):
        (root / f"file{number}").write_bytes(os.urandom(10 << 20))
    return root


def begin(cli: Cli, stage: str, project: Path) -> subprocess.Popen[bytes]:
    """Start a session and wait until it is in this stage."""
    source = {"push": [str(project)], "return": [str(project.parent / "small")]}.get(stage, ["--empty"])
    scripts = {
        "fork": "exec sleep 100",
        "command": "echo now >&2; exec sleep 100",
        "return": "for n in 1 2 3 4; do head -c 10M /dev/zero > file$n; done",
    }
    command = ["sh", "-c", scripts.get(stage, "true")]
    process = cli.start("session", *source, "--", *command)
    assert process.stderr is not None
    os.set_blocking(process.stderr.fileno(), False)
    said = b""

    def reached() -> bool:
        nonlocal said
        said += process.stderr.read() or b""  # type: ignore[union-attr]
        assert process.poll() is None, said
        return STAGES[stage] in said

    wait_for(reached, 120)
    os.set_blocking(process.stderr.fileno(), True)
    return process


@pytest.mark.parametrize(
    ("stage", "number", "delay"),
    [
        ("template", signal.SIGINT, 4),
        ("fork", signal.SIGINT, 0),
        ("fork", signal.SIGTERM, 0.4),
        ("fork", signal.SIGINT, 0.8),
        ("push", signal.SIGINT, 0.5),
        ("command", signal.SIGTERM, 0.3),
        ("command", signal.SIGHUP, 0.3),
        ("return", signal.SIGTERM, 0.4),
    ],
)
def test_an_interruption_ends_everything(
    request: pytest.FixtureRequest, big: Path, stage: str, number: signal.Signals, delay: float
) -> None:
    process = begin(request.getfixturevalue("without_templates" if stage == "template" else "cli"), stage, big)
    time.sleep(delay)
    os.kill(process.pid, number)
    status, _, stderr = ended(process)
    assert status == 128 + number, stderr
    assert b"Traceback" not in stderr


def test_a_second_ctrl_c_does_not_stop_the_cleaning_up(cli: Cli, big: Path) -> None:
    process = begin(cli, "command", big)
    for _ in range(5):
        os.kill(process.pid, signal.SIGINT)
        time.sleep(0.03)
    assert ended(process)[0] == 130


def test_what_kill_9_leaves_is_shown_and_removed_and_the_rest_lives(
    cli: Cli, guest: Guest, big: Path, fork: Callable[..., Guest]
) -> None:
    kept = fork()
    before = leftovers(cli.home)
    for stage, delay in (("fork", 0.1), ("fork", 0.9), ("push", 0.5), ("command", 0.2)):
        process = begin(cli, stage, big)
        time.sleep(delay)
        process.kill()
        process.communicate()
    rows = {row["name"]: row["state"] for row in cli.json("ls")}
    assert list(rows.values()).count("orphan") >= 3
    assert rows[guest.name] == rows[kept.name] == "running"
    removed = cli.json("gc")
    assert {item["kind"] for item in removed} <= {"session", "guest", "record"}
    assert not [item for item in removed if item["problem"]]
    wait_for(lambda: not leftovers(cli.home) - before, 20)
    assert kept.exec("echo", "alive").stdout == guest.exec("echo", "alive").stdout == b"alive\n"
    assert cli.json("gc") == [], "a second time there is nothing"
    for item in removed:
        assert item["what"] not in (guest.name, kept.name)


def test_a_template_whose_maker_was_killed_is_removed(without_templates: Cli, big: Path) -> None:
    cli = without_templates
    process = begin(cli, "template", big)
    wait_for(lambda: any(name.startswith("domain vmsandbox-template") for name in leftovers(cli.home)), 30)
    assert not [item for item in cli.json("gc") if item["kind"] in ("template", "guest")], "its maker is alive"
    process.kill()
    process.communicate()
    kinds = {item["kind"] for item in cli.json("gc")}
    assert kinds == {"guest", "template"}


def test_a_name_is_used_again_at_once(cli: Cli) -> None:
    """libvirt removes the sockets of the guest before by their paths, when it has noticed its end."""
    guest = cli.guest("again")
    cli("start", "--empty", "--name", "again")
    guest.stop()
    cli("start", "--empty", "--name", "again")
    try:
        time.sleep(3)
        assert guest.sh("echo here") == "here"
    finally:
        guest.stop()


def test_a_guest_that_died_is_shown_and_removed(fork: Callable[..., Guest]) -> None:
    guest = fork()
    os.kill(guest.qemu, signal.SIGKILL)
    wait_for(lambda: {row["name"]: row["state"] for row in guest.cli.json("ls")}[guest.name] == "dead", 20)
    done = guest.cli("exec", guest.name, "--", "true", status=125, timeout=90)
    assert b"Traceback" not in done.stderr
    with guest_locked(guest.folder):  # a rollback that gives it another one
        assert guest.cli.json("gc") == []
    assert [item["what"] for item in guest.cli.json("gc")] == [guest.name]


def test_a_guest_that_libvirt_has_forgotten_is_ended_by_its_uuid(cli: Cli) -> None:
    """As when libvirtd is killed while it starts one: no process is written down, and libvirt knows of none."""
    started = cli.start("session", "--empty", "--name", "forgotten", "--", "true")
    folder = SessionFolder(cli.layout, "forgotten")
    wait_for(lambda: (folder.path / "session.json").exists())
    os.kill(started.pid, signal.SIGSTOP)
    info = folder.info()
    words = ["qemu-system-x86_64", "-machine", "none", "-nodefaults", "-display", "none", "-uuid", info.uuid]
    guest = subprocess.Popen(words)
    try:
        wait_for(lambda: len(processes_of(info.uuid)) >= 1)
        started.kill()
        started.communicate()
        cli("gc")
        wait_for(lambda: guest.poll() is not None, timeout=5)
    finally:
        guest.kill()
        guest.wait()


def test_a_guest_that_dies_under_a_command_is_an_error(fork: Callable[..., Guest]) -> None:
    guest = fork()
    process = guest.cli.start("exec", guest.name, "--", "sh", "-c", "echo now; exec sleep 100")
    assert process.stdout is not None
    assert process.stdout.readline() == b"now\n"
    os.kill(guest.qemu, signal.SIGKILL)
    status, _, stderr = ended(process)
    assert status == 125 and b"broke" in stderr


@pytest.mark.parametrize("place", ["session.ready", "push.sent", "push.recorded", "snapshot.disk"])
def test_a_start_that_is_killed_before_all_is_in_force_leaves_no_guest(cli: Cli, big: Path, place: str) -> None:
    killed = Cli(cli.home, {"VMSANDBOX_FAILPOINT": f"{place}=kill"})
    killed("start", big.parent / "small", "--name", "early", status=-9)
    cli("gc")
    assert not (cli.layout.live / "early").exists()


@pytest.mark.parametrize("what", ["program", "guest"])
def test_a_start_that_is_interrupted_while_its_start_is_kept_leaves_no_guest(
    cli: Cli, tmp_path: Path, what: str
) -> None:
    flag, folder = tmp_path / "flag", SessionFolder(cli.layout, "early")
    waiting = Cli(cli.home, {"VMSANDBOX_FAILPOINT": f"snapshot.memory=tell:{flag}"})
    process = waiting.start("start", "--empty", "--name", "early")
    wait_for(flag.exists, 60)
    if what == "program":
        os.kill(process.pid, signal.SIGINT)
    else:
        os.kill(folder.qemu_pid(folder.info()), signal.SIGKILL)
    flag.unlink()
    status, out, stderr = ended(process)
    assert status == {"program": 130, "guest": 125}[what] and not out, stderr
    assert not folder.path.exists()


@pytest.mark.parametrize("place", ["snapshot.memory", "snapshot.published"])
def test_a_start_that_cannot_be_kept_is_no_reason_to_have_no_guest(cli: Cli, place: str) -> None:
    full = Cli(cli.home, {"VMSANDBOX_FAILPOINT": f"{place}=enospc"})
    done = full("start", "--empty", "--name", "kept")
    try:
        assert b"its start was not kept" in done.stderr and done.stdout == b"kept\n"
        assert cli.guest("kept").exec("echo", "here").stdout == b"here\n"
    finally:
        cli("stop", "kept")


def test_the_name_of_a_guest_whose_record_cannot_be_read_is_in_use(fork: Callable[..., Guest]) -> None:
    guest = fork()
    record = guest.folder.path / "session.json"
    text, qemu = record.read_text(), guest.qemu
    record.write_text(text[:100])
    assert b"exists already" in guest.cli("start", "--empty", "--name", guest.name, status=125).stderr
    record.write_text(text)
    assert guest.sh("echo alive") == "alive" and guest.qemu == qemu


def test_the_journal_of_what_was_killed_is_whole(cli: Cli, big: Path) -> None:
    process = begin(cli, "command", big)
    (row,) = [row for row in cli.json("ls") if row["name"] != "shared"]
    process.kill()
    process.communicate()
    cli("gc")
    events = [json.loads(line) for line in cli("logs", row["id"], "--json").stdout.splitlines()]
    assert events[0]["kind"] == "session.opened" and events[-1]["kind"] == "command.started"


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small file system")
def test_what_of_a_template_in_the_making_cannot_be_removed_stays_written_down(without_templates: Cli) -> None:
    store = TemplateStore(without_templates.layout)
    with closing(Host.open()) as host:
        with in_the_making(host, GuestShape(Accelerator.TCG), store) as (_uuid, _making, run, _user):
            busy = run / "busy"
            busy.mkdir()
            if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", busy], capture_output=True).returncode:
                pytest.skip("mounting is not allowed here")
        try:
            assert {row.identity for row in store.ledger.rows()} >= {run.name}
        finally:
            subprocess.run(["umount", busy], check=True)
            shutil.rmtree(run)
        with in_the_making(host, GuestShape(Accelerator.TCG), store) as (_uuid, _making, another, _user):
            pass
        assert another.name not in {row.identity for row in store.ledger.rows()}
