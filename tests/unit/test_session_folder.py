"""A session's folder is the claim on its name and what `gc` goes by: it is whole or it is not there."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vmsandbox import failpoints
from vmsandbox.errors import GuestError, HostError, UserInputError
from vmsandbox.ledger.processes import process_started
from vmsandbox.paths import Layout
from vmsandbox.session.live.teardown import tear_down
from vmsandbox.session.state.folder import SessionFolder, live_sessions
from vmsandbox.session.state.info import SessionInfo, SessionKeys, new_session_id
from vmsandbox.session.transfer.project import guest_folder_for


@pytest.fixture
def layout(short_home: Path) -> Layout:
    return Layout.from_environment({"VMSANDBOX_HOME": str(short_home)})


def info_of(name: str, **fields: object) -> SessionInfo:
    info = SessionInfo(
        id=new_session_id(name), name=name, uuid="11111111-2222-4333-8444-555555555555", domain=f"vmsandbox-{name}",
        created="2026-01-02T15:04:05Z", owner_pid=os.getpid(), owner_started=process_started(os.getpid()) or 0,
        image="base", image_digest="0" * 64, template="1" * 32, ssh_ports=2, memory_mib=512, vcpus=2,
    )  # fmt: skip
    return dataclasses.replace(info, **fields)  # type: ignore[arg-type]


def test_what_was_written_is_read(layout: Layout) -> None:
    folder = SessionFolder(layout, "one")
    folder.claim(info_of("one", project="/a \n'\"b"))
    assert folder.info().project == "/a \n'\"b"
    folder.update(dataclasses.replace(folder.info(), ready=True, grade="emulated"))
    assert folder.info().ready and folder.info().grade == "emulated"
    assert [path.name for path in folder.path.iterdir()] == ["session.json"], "a temporary file stayed"


def test_a_name_is_taken_once(layout: Layout) -> None:
    SessionFolder(layout, "one").claim(info_of("one"))
    with pytest.raises(UserInputError, match="exists already"):
        SessionFolder(layout, "one").claim(info_of("one"))
    assert sorted(path.name for path in layout.live.iterdir()) == ["one"]


def _claim(home: Path, start: object) -> None:
    start.wait()  # type: ignore[attr-defined]
    try:
        SessionFolder(Layout.from_environment({"VMSANDBOX_HOME": str(home)}), "one").claim(info_of("one"))
    except UserInputError:
        sys.exit(7)


def test_of_many_at_once_one_gets_the_name(short_home: Path) -> None:
    context = multiprocessing.get_context("fork")
    start = context.Barrier(8)
    claims = [context.Process(target=_claim, args=(short_home, start)) for _ in range(8)]
    for claim in claims:
        claim.start()
    for claim in claims:
        claim.join()
    assert sorted(claim.exitcode or 0 for claim in claims) == [0] + [7] * 7


@pytest.mark.parametrize(
    "name", ["", "..", "a/b", "A", "-a", "a-", "a" * 41, "a\n", "a b", "ü", ".hidden", "a.b", "$(id)"]
)
def test_names_that_could_be_something_else_are_refused(layout: Layout, name: str) -> None:
    with pytest.raises(UserInputError, match="not a session name"):
        SessionFolder(layout, name)


def test_no_room_is_an_error_that_says_so(layout: Layout) -> None:
    layout.live.parent.mkdir(parents=True)
    layout.live.write_text("a file where the folder should be")
    with pytest.raises(HostError, match="cannot be made"):
        SessionFolder(layout, "one").claim(info_of("one"))


@pytest.mark.parametrize("content", ["", "{", "[]", '{"id": 1}', '{"unknown": 1}'])
def test_a_damaged_record_is_an_error_that_says_so(layout: Layout, content: str) -> None:
    folder = SessionFolder(layout, "one")
    folder.claim(info_of("one"))
    (folder.path / "session.json").write_text(content)
    with pytest.raises(HostError, match="cannot be read"):
        folder.info()


def test_keys_are_private_and_are_an_error_before_they_exist(layout: Layout) -> None:
    folder = SessionFolder(layout, "one")
    folder.claim(info_of("one"))
    with pytest.raises(GuestError, match="still starting"):
        folder.keys()
    folder.save_keys(SessionKeys("ssh-ed25519 AAAA", "private\n"))
    assert folder.keys() == SessionKeys("ssh-ed25519 AAAA", "private\n")
    assert folder.identity_file.stat().st_mode & 0o777 == 0o600
    assert folder.known_hosts_file.read_text() == "vmsandbox-one ssh-ed25519 AAAA\n"


def test_each_port_is_used_once_and_given_back(layout: Layout) -> None:
    folder = SessionFolder(layout, "one")
    folder.claim(info_of("one"))
    with folder.ssh_port(2) as first, folder.ssh_port(2) as second:
        assert {first, second} == {0, 1}
        with pytest.raises(GuestError, match="all 2 SSH ports"), folder.ssh_port(2):
            pass
    with folder.ssh_port(2) as again:
        assert again == 0


def test_one_project_goes_in_at_a_time(layout: Layout) -> None:
    folder = SessionFolder(layout, "one")
    folder.claim(info_of("one"))
    folder.run.mkdir(parents=True)
    with socket.socket(socket.AF_UNIX) as qemu:
        qemu.bind(str(folder.run / "bulk"))
        qemu.listen()
        with folder.bulk_port(), pytest.raises(GuestError, match="being copied into"), folder.bulk_port():
            pass
        with folder.bulk_port():
            pass


def test_an_owner_is_a_process_and_not_a_number() -> None:
    child = subprocess.Popen(["sleep", "60"])
    try:
        started = process_started(child.pid)
        owned = info_of("one", owner_pid=child.pid, owner_started=started)
        assert owned.owner_is_alive
        assert not dataclasses.replace(owned, owner_started=(started or 0) + 1).owner_is_alive
        child.kill()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert not owned.owner_is_alive, "a zombie owns nothing"
    finally:
        child.kill()
        child.wait()
    assert not owned.owner_is_alive
    assert not info_of("one", owner_pid=0).owner_is_alive


def test_what_is_being_claimed_is_no_session(layout: Layout) -> None:
    SessionFolder(layout, "one").claim(info_of("one"))
    (layout.live / ".two.abcd").mkdir()
    assert [folder.name for folder in live_sessions(layout)] == ["one"]


def test_teardown_never_kills_a_process_that_is_not_the_sessions(layout: Layout) -> None:
    """Process ids are used again: the one in the record may be anybody's by now."""
    folder = SessionFolder(layout, "one")
    folder.claim(info_of("one"))
    stranger = subprocess.Popen(["sleep", "60"])
    try:
        folder.pid_file(folder.info()).write_text(str(stranger.pid))
        from vmsandbox.session.live.teardown import _kill_process

        assert not _kill_process(folder, folder.info())
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()


def test_teardown_ends_the_sessions_process_and_removes_no_more_than_its_own(layout: Layout, tmp_path: Path) -> None:
    folder = SessionFolder(layout, "one")
    folder.claim(info_of("one"))
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "file").write_text("kept")
    files = folder.vm(folder.info())
    files.mkdir()
    (files / "link").symlink_to(precious)
    folder.run.parent.mkdir(parents=True, exist_ok=True)
    sockets = folder.run
    sockets.symlink_to(precious)
    qemu = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)", f"uuid={folder.info().uuid}"])
    while not Path(f"/proc/{qemu.pid}/cmdline").read_bytes():
        time.sleep(0.01)  # just after exec it is empty
    folder.pid_file(folder.info()).write_text(str(qemu.pid))
    assert tear_down(layout, folder, folder.info()) == []
    assert qemu.wait(timeout=10) == -9
    assert not folder.path.exists() and not sockets.is_symlink()
    assert (precious / "file").read_text() == "kept"


def test_a_name_that_is_given_back_may_be_anothers_at_once(layout: Layout) -> None:
    """Two end one session, a third one takes its name between them."""
    folder, first = SessionFolder(layout, "one"), info_of("one")
    folder.claim(first)
    second = info_of("one", uuid="99999999-2222-4333-8444-555555555555")

    def meanwhile(name: str) -> None:
        if name == "destroy.guest-files":
            shutil.rmtree(folder.path)
            folder.claim(second)

    with failpoints.switched_on(meanwhile):
        assert tear_down(layout, folder, first) == []
    assert folder.info().id == second.id
    assert [path.name for path in layout.live.iterdir()] == ["one"]


@pytest.mark.parametrize(
    ("project", "folder"),
    [("demo", "demo"), ("my.app-2", "my.app-2"), ("-rf", "project"), ("$(id)", "project"), ("a b", "project"),
     ("..x", "project"), ("ü", "project"), ("a\nb", "project"), ("x" * 65, "project"), (".git", "project")],
)  # fmt: skip
def test_an_unusual_project_name_does_not_reach_the_guest(tmp_path: Path, project: str, folder: str) -> None:
    assert guest_folder_for(tmp_path / project) == f"/home/claude-worker/projects/{folder}"
