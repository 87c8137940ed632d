"""Snapshots of guests with a filtered card: the card is never part of one, and each guest that comes has its own."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from harness import Cli, make_tree, nothing_more, wait_for
from netted import BALLOONED, fetch, keeper_of, named
from rooted import RootedGuest, with_root
from upstream import Upstream

from vmsandbox.errors import RefusedError
from vmsandbox.failpoints import switched_on
from vmsandbox.hypervisor.connection import Host, default_uri
from vmsandbox.hypervisor.plugging import holds_tap
from vmsandbox.policy.values import NetworkPolicy, Policy
from vmsandbox.render.network import CardPlan
from vmsandbox.session.asked.request import SessionRequest
from vmsandbox.session.network.filtered import read_plan
from vmsandbox.session.opening import plan
from vmsandbox.session.rewind.replug import MARK
from vmsandbox.session.rewind.snapshots import take_snapshot
from vmsandbox.session.sandbox import Sandbox
from vmsandbox.spec import NetworkMode

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or default_uri() != "qemu:///system", reason="a filtered card needs root and qemu:///system"
)

# Connects to the proxy, says so, and asks only when a file is there.
LATE = """
import os, socket, time
host, port = os.environ["http_proxy"].removeprefix("http://").rstrip("/").split(":")
with socket.create_connection((host, int(port)), timeout=60) as sock:
    open("connected", "w").close()
    while not os.path.exists("ask"):
        time.sleep(0.05)
    sock.sendall(b"CONNECT allowed.test:%d HTTP/1.1\\r\\nHost: allowed.test:%d\\r\\n\\r\\n")
    open("answer", "wb").write(sock.recv(100))
"""


@pytest.fixture(scope="module")
def carded_project(upstream: Upstream, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its guests have the shape that the other tests of cards make a template of."""
    policy = upstream.policy() + "  resources: {memory: 512M, memory_reserved: 320M}\n"
    return make_tree(tmp_path_factory.mktemp("projects") / "carded", {".claude/sandbox.yaml": policy})


@pytest.fixture(scope="module")
def carded(netcli: Cli, carded_project: Path) -> Iterator[RootedGuest]:
    netcli("start", *named(carded_project), "--net", "filtered", "--name", "carded")
    guest = RootedGuest(netcli, "carded")
    yield guest
    guest.stop()


@pytest.fixture(autouse=True)
def nothing_left(cli: Cli) -> Iterator[None]:
    with nothing_more(cli.home):
        yield


def reaches(guest: RootedGuest, upstream: Upstream) -> bool:
    return fetch(guest, f"https://allowed.test:{upstream.port}/echo")[0] == "200"


def was_frozen(guest: RootedGuest) -> bool:
    return any(event["kind"] == "guest.frozen" for event in guest.journal())


def card(guest: RootedGuest) -> CardPlan:
    return read_plan(guest.folder)


def test_a_connection_outlives_a_snapshot_and_the_card_is_watched_all_the_time(
    carded: RootedGuest, upstream: Upstream
) -> None:
    assert [row["tag"] for row in carded.cli.json("snapshots", "carded")] == ["start"]
    script = LATE.replace("%d", str(upstream.port))
    carded.sh('nohup python3 -c "$1" > /dev/null 2>&1 < /dev/null & echo kept > kept.txt', script)
    wait_for(lambda: carded.sh("ls connected 2> /dev/null; true") == "connected", timeout=30, every=0.3)
    keeper = keeper_of(carded)
    carded.cli("snapshot", "carded", "work")
    assert holds_tap(carded.qemu) and reaches(carded, upstream)
    carded.sh("touch ask")
    wait_for(lambda: b" 200 " in carded.sh("cat answer 2> /dev/null; true").encode(), timeout=30, every=0.3)
    time.sleep(2)  # the watch looks every second
    assert keeper_of(carded) == keeper and not was_frozen(carded)


def test_a_rolled_back_guest_has_the_card_and_all_is_as_it_was(carded: RootedGuest, upstream: Upstream) -> None:
    before, its = carded.info, card(carded)
    carded.cli("rollback", "carded", "work", "--verify")
    assert carded.info.uuid != before.uuid and card(carded) == its
    assert carded.sh("cat kept.txt; ls ask 2> /dev/null; cat /sys/class/net/eth0/address").split() == ["kept", its.mac]
    assert reaches(carded, upstream)
    carded.cli("rollback", "carded")
    assert carded.sh("ls kept.txt 2> /dev/null; true") == "" and reaches(carded, upstream)
    assert not was_frozen(carded)


def test_sessions_that_begin_as_its_snapshot_have_cards_of_their_own(
    carded: RootedGuest, upstream: Upstream, carded_project: Path
) -> None:
    policy = carded_project / ".claude/sandbox.yaml"
    others = [RootedGuest(carded.cli, name) for name in ("carded-1", "carded-2")]
    try:
        for guest in others:
            carded.cli("start", "--from", "carded:work", "--policy", policy, "--name", guest.name)
            assert guest.info.network == "filtered" and guest.sh("cat kept.txt") == "kept"
        three = (carded, *others)
        assert all(reaches(guest, upstream) for guest in three)
        assert len({card(guest).guest_address for guest in three}) == 3
        assert len({guest.sh("cat /sys/class/net/eth*/address") for guest in three}) == 3
        assert others[0].sh("ls /sys/class/net").split() == ["eth0", "lo"]
    finally:
        carded.cli("stop", *(guest.name for guest in others), status=None)


@pytest.mark.parametrize(
    ("words", "place"),
    [
        (("snapshot", "carded", "killed"), "card.unplugged"),
        (("snapshot", "carded", "killed"), "card.returning"),
        (("snapshot", "carded", "killed"), "card.plugged"),
        (("rollback", "carded"), "rollback.ended"),
        (("rollback", "carded"), "rollback.freed"),
        (("rollback", "carded"), "card.returning"),
    ],
)
def test_a_guest_whose_card_was_out_when_the_program_was_killed_gets_it_back(
    carded: RootedGuest, upstream: Upstream, words: tuple[str, ...], place: str
) -> None:
    killed = Cli(carded.cli.home, {**carded.cli.env, "VMSANDBOX_FAILPOINT": f"{place}=kill"})
    killed(*words, status=-9)
    carded.cli("gc")
    assert holds_tap(carded.qemu) and reaches(carded, upstream)
    assert not was_frozen(carded) and carded.cli.json("gc") == []
    assert {row["tag"] for row in carded.cli.json("snapshots", "carded")} == {"start", "work"}


def test_an_interruption_while_the_card_comes_back_leaves_it_in(carded: RootedGuest, upstream: Upstream) -> None:
    interrupted = Cli(carded.cli.home, {**carded.cli.env, "VMSANDBOX_FAILPOINT": "card.returning=interrupt"})
    interrupted("snapshot", "carded", "broken", status=130)
    assert holds_tap(carded.qemu) and reaches(carded, upstream)
    assert not (carded.folder.path / MARK).exists() and carded.cli.json("gc") == []


def test_the_guest_that_came_is_watched(carded: RootedGuest) -> None:
    carded.cli("rollback", "carded", "work")
    its = card(carded)
    subprocess.run(["nft", "delete", "table", "bridge", its.table], check=True)
    with closing(Host.open()) as host:
        wait_for(lambda: not host.is_running(carded.info.uuid), timeout=2, every=0.02)
    wait_for(lambda: was_frozen(carded), timeout=5)
    carded.stop()


@contextmanager
def hostile(cli: Cli, name: str) -> Iterator[RootedGuest]:
    """A guest with a card whose root is in the test's hands."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "confinement_of", with_root)
        policy = Policy(network=NetworkPolicy(mode="filtered"), resources=BALLOONED)
        request = SessionRequest(
            name=name, allow_emulation=True, keep=True, network=NetworkMode.FILTERED, policy=policy
        )
        Sandbox.open(request=request, layout=cli.layout).disconnect()
        guest = RootedGuest(cli, name)
        try:
            yield guest
        finally:
            guest.stop()


@pytest.fixture
def stubborn(cli: Cli) -> Iterator[RootedGuest]:
    """Its kernel does not hear of devices that go."""
    with hostile(cli, "stubborn") as guest:
        guest.root("echo disable > /sys/firmware/acpi/interrupts/gpe01")
        yield guest


@pytest.fixture(scope="module")
def refusing(cli: Cli) -> Iterator[RootedGuest]:
    with hostile(cli, "refusing") as guest:
        yield guest


def test_a_guest_that_keeps_its_card_has_no_snapshot_and_goes_on(stubborn: RootedGuest) -> None:
    refused = stubborn.cli("snapshot", "stubborn", "one", status=125)
    assert b"does not let go of its network card" in refused.stderr
    assert stubborn.cli.json("snapshots", "stubborn") == []
    assert holds_tap(stubborn.qemu) and stubborn.sh("echo alive") == "alive" and not was_frozen(stubborn)


# Answers all, but sets no card up once it was told that it was rolled back.
REFUSING = r"""
program=/usr/lib/vmsandbox/vmsandbox-control
sed -i 's/^def again(request):$/&\n    open("\/run\/refuse", "w")/' $program
sed -i 's/^def card(request):$/&\n    assert not os.path.exists("\/run\/refuse")/' $program
grep -c run/refuse $program
systemctl restart vmsandbox-control
"""


def test_a_guest_that_refuses_to_set_its_card_up_is_no_obstacle_to_the_next_rollback(refusing: RootedGuest) -> None:
    refusing.cli("snapshot", "refusing", "clean")
    assert refusing.root(REFUSING).strip() == "2"
    refusing.cli("snapshot", "refusing", "bad")
    said = refusing.cli("rollback", "refusing", "bad").stderr
    assert b"did not set up its network card" in said
    assert refusing.cli.json("gc") == [] and holds_tap(refusing.qemu)
    assert b"did not set up" not in refusing.cli("rollback", "refusing", "clean").stderr
    assert refusing.cli.json("gc") == [] and holds_tap(refusing.qemu)


def test_a_card_is_not_plugged_in_where_its_rules_are_gone(refusing: RootedGuest) -> None:
    def flushed(name: str) -> None:
        if name == "card.unplugged":
            subprocess.run(["nft", "delete", "table", "bridge", card(refusing).table], check=True)

    with switched_on(flushed), pytest.raises(RefusedError, match="cannot be guarded"):
        take_snapshot(Sandbox.attach("refusing", layout=refusing.cli.layout), "late")
    assert not holds_tap(refusing.qemu) and refusing.sh("echo alive") == "alive"
    (left,) = refusing.cli.json("gc", status=None)
    assert "cannot be guarded" in left["problem"] and not holds_tap(refusing.qemu)
