"""`exec`: a command's streams, status and arguments are its own, and nothing of them is syntax."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from harness import Cli, Guest, ended, wait_for
from rooted import RootedGuest

from vmsandbox.guest.control import connect_ssh
from vmsandbox.guest.ssh import GuestShell
from vmsandbox.hypervisor.connection import Host
from vmsandbox.spec import WORKER


def test_stdout_and_stderr_stay_apart(guest: Guest) -> None:
    done = guest.exec("sh", "-c", "echo out; echo err >&2")
    assert (done.stdout, done.stderr) == (b"out\n", b"err\n")


@pytest.mark.parametrize(("script", "status"), [("exit 255", 255), ("kill -TERM $$", 143), ("kill -KILL $$", 137)])
def test_the_status_is_the_commands_own(guest: Guest, script: str, status: int) -> None:
    guest.exec("sh", "-c", script, status=status)


def test_a_command_that_is_not_there(guest: Guest) -> None:
    assert b"no-such-program" in guest.exec("no-such-program", status=127).stderr


WORDS = [
    "", " ", "a b", "'", '"', "$(id)", "`id`", "a\nb", "\\", "*", "~", "-oProxyCommand=touch /tmp/x", "--", ";id",
    "$HOME", "!!", "\t", "ü€😀", "\x1b[31m", "-c", "&&", "#",
]  # fmt: skip


def test_arguments_are_data(guest: Guest) -> None:
    done = guest.exec("printf", "%s\\0", *WORDS)
    assert done.stdout.decode().split("\0") == [*WORDS, ""]


def test_the_programs_own_name_is_data_too(guest: Guest) -> None:
    guest.exec("-oProxyCommand=$(touch /tmp/oops);touch /tmp/oops", status=127)
    guest.exec("test", "!", "-e", "/tmp/oops")


def test_the_working_folder_is_the_project(guest: Guest) -> None:
    assert guest.exec("pwd").stdout == b"/home/claude-worker/projects/demo\n"


def test_stdin_passes_twenty_binary_megabytes_there_and_back(guest: Guest) -> None:
    data = os.urandom(20 << 20)
    done = guest.exec("cat", stdin=data)
    assert hashlib.sha256(done.stdout).digest() == hashlib.sha256(data).digest()


def test_a_command_that_does_not_read_its_stdin_still_ends(guest: Guest) -> None:
    began = time.monotonic()
    guest.exec("true", stdin=bytes(20 << 20))
    assert time.monotonic() - began < 30


def test_an_open_stdin_does_not_hold_a_command_that_ended(guest: Guest) -> None:
    process = guest.cli.start("exec", guest.name, "--", "true", stdin=subprocess.PIPE)
    wait_for(lambda: process.poll() is not None, 20)
    assert ended(process)[0] == 0


def resident(pid: int) -> int:
    """Bytes that a process has in memory."""
    return int(Path(f"/proc/{pid}/status").read_text().split("VmRSS:")[1].split()[0]) << 10


def test_a_flood_is_throttled_and_costs_no_memory(guest: Guest) -> None:
    """Nobody reads our stdout: the guest has to wait, and we must not collect what it writes."""
    process = guest.cli.start("exec", guest.name, "--", "cat", "/dev/zero")
    try:
        time.sleep(3)
        first = resident(process.pid)
        assert first < 120 << 20
        # And when somebody reads, no more is held than a window of it.
        assert process.stdout is not None
        assert sum(len(process.stdout.read(1 << 20)) for _ in range(20)) == 20 << 20
        assert resident(process.pid) < first + (16 << 20)
    finally:
        process.kill()
        process.communicate()


def cpu_seconds(process: int) -> float:
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_all_ports_in_use_is_a_clear_error(fork: Callable[..., Guest]) -> None:
    guest = fork("--empty", "--ssh-ports", "6")
    holding = [guest.cli.start("exec", guest.name, "--", "sleep", "120") for _ in range(6)]
    try:
        wait_for(lambda: sum(event["kind"] == "command.started" for event in guest.journal()) == 6, 60)
        done = guest.exec("true", status=125)
        assert b"all 6 SSH ports" in done.stderr and b"--ssh-ports" in done.stderr
    finally:
        for process in holding:
            process.kill()
            process.communicate()
    # A client that was killed gives its port back.
    assert guest.exec("echo", "again").stdout == b"again\n"


def test_a_slow_guest_is_left_in_peace(guest: Guest) -> None:
    """Its server is still busy with the login when the host has gone again: on a busy host `start` was just that."""
    keys = guest.folder.keys()
    with guest.folder.ssh_port(6) as port:
        sock = connect_ssh(guest.folder.ssh_socket(port), 60)
        shell = GuestShell.connect(sock, user=WORKER, host_key=keys.host_key, user_key=keys.user_key, deadline=60)
        os.kill(guest.qemu, signal.SIGSTOP)
        slow = threading.Timer(0.5, os.kill, (guest.qemu, signal.SIGCONT))
        slow.start()
        shell.leave()
        slow.join()

        def is_quiet() -> bool:
            before = cpu_seconds(guest.qemu)
            time.sleep(2)
            return cpu_seconds(guest.qemu) - before < 0.5

        wait_for(is_quiet, 30)  # else its server tries for ever to say something to nobody


def test_several_at_once(guest: Guest) -> None:
    answers: dict[int, bytes] = {}

    def one(number: int) -> None:
        answers[number] = guest.exec("sh", "-c", f"sleep 1; echo {number}").stdout

    threads = [threading.Thread(target=one, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == {number: b"%d\n" % number for number in range(4)}


def test_ctrl_c_interrupts_the_command_in_the_guest_too(guest: Guest) -> None:
    process = guest.cli.start("exec", guest.name, "--", "sleep", "12345")
    wait_for(lambda: guest.exec("pgrep", "-f", "^sleep 12345", status=None).returncode == 0, every=0.2)
    os.killpg(process.pid, 2)
    assert ended(process)[0] == 130
    assert guest.exec("pgrep", "-f", "^sleep 12345", status=None).returncode == 1


def test_exec_without_a_command_and_of_an_unknown_session(cli: Cli) -> None:
    assert b"there is no session named" in cli("exec", "nobody", "--", "true", status=125).stderr
    assert b"not a session name" in cli("exec", "../../etc", "--", "true", status=125).stderr
    assert b"which command" in cli("exec", "nobody", status=125).stderr


@pytest.fixture(scope="module")
def rooted(make_rooted: Callable[[], RootedGuest]) -> RootedGuest:
    return make_rooted()


def test_a_port_serves_one_connection_after_the_other(rooted: RootedGuest) -> None:
    """systemd comes in only where a server was killed: to start a unit anew costs an emulated guest a second."""
    for _ in range(3):
        # Nor does what runs it in the background leave it deaf to Ctrl-C.
        assert int(rooted.exec("grep", "SigIgn", "/proc/self/status").stdout.split()[1], 16) == 0
    ports = [f"vmsandbox-ssh@{number}" for number in range(rooted.info.ssh_ports)]
    assert rooted.root(f"systemctl show -P NRestarts {' '.join(ports)}").split() == ["0"] * len(ports)

    script = (
        "for unit; do main=$(systemctl show -P MainPID $unit); kill -9 $(cat /proc/$main/task/$main/children); done"
    )
    rooted.root(f"set -- {' '.join(ports[1:])}; {script}")  # the first port is what this is said through
    holding = [rooted.cli.start("exec", rooted.name, "--", "sleep", "120") for _ in ports[1:]]
    try:
        wait_for(lambda: [event["kind"] for event in rooted.journal()].count("command.started") == 3 + len(holding), 90)
    finally:
        for process in holding:
            process.kill()
            process.communicate()


def test_a_fork_is_ready_before_it_has_read_its_disk(fork: Callable[..., Guest]) -> None:
    """All that its first connection needs is in the template's memory."""
    guest = fork("--empty")
    with closing(Host.open()) as host:
        devices = host.qmp(guest.info.uuid, "query-blockstats")
    assert [device["stats"]["rd_operations"] for device in devices] == [0]
