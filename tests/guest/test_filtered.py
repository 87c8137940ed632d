"""Guarantee: a filtered guest's card reaches the broker and nothing else, whatever its root sends.

Where it says that nothing got through, a listener on the guest's tap has seen that it was sent.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest
from frames import ATTACK, Listener
from harness import Cli, Guest, wait_for
from netted import BALLOONED
from rooted import RootedGuest, with_root
from upstream import ADDRESS, Upstream, serve

from vmsandbox.errors import RefusedError
from vmsandbox.hypervisor.connection import Host, default_uri
from vmsandbox.hypervisor.console import ConsoleTail
from vmsandbox.hypervisor.network import refuse_where_impossible
from vmsandbox.policy.values import NetworkPolicy, NetworkRule, Policy
from vmsandbox.render.network import CardPlan, bridge_of, name_prefix, table_of
from vmsandbox.session.asked.request import SessionRequest
from vmsandbox.session.network.filtered import read_plan
from vmsandbox.session.opening import plan
from vmsandbox.session.sandbox import Sandbox
from vmsandbox.spec import NetworkMode

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or default_uri() != "qemu:///system", reason="a filtered card needs root and qemu:///system"
)

ALLOWED = "allowed.test"
QUERY = """
import socket, struct, sys
def ask(server, name, kind, stream):
    question = b"".join(bytes([len(part)]) + part.encode() for part in name.split(".")) + b"\\0"
    query = struct.pack("!HHHHHH", 7, 0x100, 1, 0, 0, 0) + question + struct.pack("!HH", kind, 1)
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM if stream else socket.SOCK_DGRAM) as sock:
        sock.settimeout(5)
        sock.connect((server, 53))
        sock.sendall((struct.pack("!H", len(query)) if stream else b"") + query)
        answer = sock.recv(4096)[2 if stream else 0:]
    code, count = answer[3] & 15, struct.unpack("!H", answer[6:8])[0]
    return code, socket.inet_ntoa(answer[-4:]) if count and kind == 1 else count
for name in sys.argv[2:]:
    for stream in (False, True):
        print(name, *ask(sys.argv[1], name, 1, stream), *ask(sys.argv[1], name, 28, stream))
"""
FETCH = """
import sys, urllib.error, urllib.request
opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
for url in sys.argv[1:]:
    try:
        print(opener.open(url, timeout=30).read().decode().strip())
    except urllib.error.HTTPError as error:
        print(error.code, error.read().decode()[:300].strip())
    except OSError as error:
        print(getattr(error, "reason", error))
"""
CONNECT = """
import errno, select, socket, sys, time
waiting = {}
for where in sys.argv[1:]:
    host, _, port = where.rpartition(":")
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    sock.setblocking(False)
    code = sock.connect_ex((host, int(port)))
    if code == errno.EINPROGRESS:
        waiting[sock] = where
    else:
        print(where, errno.errorcode.get(code, "REACHED"))
until = time.monotonic() + 4
while waiting and time.monotonic() < until:
    for sock in select.select([], list(waiting), [], until - time.monotonic())[1]:
        code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        print(waiting.pop(sock), errno.errorcode.get(code, "REACHED"))
for where in waiting.values():
    print(where, "timeout")
"""


@pytest.fixture(scope="module")
def upstream(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Upstream]:
    up, server = serve(tmp_path_factory.mktemp("upstream"), 443)
    yield up
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def make(cli: Cli, upstream: Upstream) -> Iterator[Callable[[], RootedGuest]]:
    """Makes filtered guests whose root is in the test's hands."""
    rule = NetworkRule(ALLOWED, ports=(443,), addresses=(ADDRESS,))
    policy = Policy(network=NetworkPolicy(mode="filtered", rules=(rule,)), resources=BALLOONED)
    with ExitStack() as stack, pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "confinement_of", with_root)
        patch.setenv("SSL_CERT_FILE", str(upstream.bundle))

        def make_one() -> RootedGuest:
            name = f"f-{uuid.uuid4().hex[:8]}"
            request = SessionRequest(
                name=name, allow_emulation=True, keep=True, network=NetworkMode.FILTERED, policy=policy
            )
            sandbox = Sandbox.open(request=request, layout=cli.layout)
            sandbox.disconnect()
            guest = RootedGuest(cli, name)
            stack.callback(guest.stop)
            stack.enter_context(ConsoleTail(guest.folder.run / "console"))
            return guest

        yield make_one


@pytest.fixture(scope="module")
def guest(make: Callable[[], RootedGuest]) -> RootedGuest:
    """The attacker."""
    return make()


@pytest.fixture(scope="module")
def other(make: Callable[[], RootedGuest]) -> RootedGuest:
    """Its neighbour."""
    return make()


def card(guest: Guest) -> CardPlan:
    return read_plan(guest.folder)


def traces(plan: CardPlan) -> set[str]:
    """What is on the host of a card."""
    host = Host.open()
    try:
        found = {f"libvirt's {name}" for name in host.network_names() if name == plan.name}
    finally:
        host.close()
    found |= {name for name in os.listdir("/sys/class/net") if name in (plan.bridge, plan.tap)}
    ruleset = subprocess.run(["nft", "list", "ruleset"], check=True, capture_output=True, text=True).stdout
    return found | {f"rules for {name}" for name in (plan.table, plan.bridge, plan.tap) if name in ruleset}


def test_the_card_is_the_sessions_own_and_has_no_way_on(guest: RootedGuest) -> None:
    its = card(guest)
    mac, addresses, routes, six = guest.root(
        "cat /sys/class/net/eth0/address; ip -br -4 addr show dev eth0; ip route | wc -l; "
        "ip -6 addr show dev eth0 | wc -l"
    ).splitlines()
    assert mac == its.mac
    assert addresses.split()[2:] == [f"{its.guest_address}/30"]
    assert (routes, six) == ("1", "0"), "to the network of two, and no IPv6"
    said = subprocess.run(["ip", "-j", "addr", "show", "dev", its.bridge], check=True, capture_output=True).stdout
    assert [address["local"] for address in json.loads(said)[0]["addr_info"]] == [its.host_address]


def test_tools_that_know_no_proxy_reach_what_is_allowed_and_are_told_what_is_not(guest: RootedGuest) -> None:
    lines = guest.run("python3", "-c", FETCH, f"https://{ALLOWED}/echo", "https://other.test/").stdout.splitlines()
    assert lines[0] == f"GET /echo {ALLOWED}".encode()
    assert b"resolution" in lines[1] or b"not known" in lines[1]
    by_address = f"import urllib.request as u; u.urlopen(u.Request('http://{card(guest).host_address}/', " \
        "headers={'Host': 'other.test'}), timeout=20)"  # fmt: skip
    refused = guest.run("env", "-u", "http_proxy", "-u", "HTTP_PROXY", "python3", "-c", by_address, status=1)
    assert b"403" in refused.stderr
    assert guest.run("git", "ls-remote", f"https://{ALLOWED}/repo.git").stdout.split()[1] == b"HEAD", "by the proxy"


def test_names_lead_to_the_bridge_or_nowhere(guest: RootedGuest) -> None:
    its = card(guest)
    lines = guest.run("python3", "-c", QUERY, its.host_address, ALLOWED, "other.test", f"a.{ALLOWED}").stdout
    found = [line.split() for line in lines.decode().splitlines()]
    # response code 0 and the bridge's address, and no IPv6; 5: REFUSED (RFC 1035, RFC 6891)
    assert found[:2] == [[ALLOWED, "0", its.host_address, "0", "0"]] * 2
    assert [[code, kind] for _, code, _, kind, _ in found[2:]] == [["5", "5"]] * 4


def test_nothing_but_the_brokers_ports_is_reached(guest: RootedGuest, other: RootedGuest) -> None:
    """With a default route and IPv6 that root has added; listeners on all of the host's addresses see nobody."""
    its, others = card(guest), card(other)
    host_addresses = [
        entry["local"]
        for link in json.loads(subprocess.run(["ip", "-j", "-4", "addr"], check=True, capture_output=True).stdout)
        for entry in link["addr_info"]
        if entry["local"] != its.host_address
    ]
    guest.root(
        f"ip route add default via {its.host_address}; echo 0 > /proc/sys/net/ipv6/conf/eth0/disable_ipv6; "
        "ip -6 addr add 2001:db8::2/64 dev eth0 nodad; ip -6 route add default dev eth0"
    )
    try:
        with ExitStack() as stack:
            heard = []
            for family, kind in ((socket.AF_INET, socket.SOCK_STREAM), (socket.AF_INET6, socket.SOCK_STREAM),
                                 (socket.AF_INET, socket.SOCK_DGRAM)):  # fmt: skip
                sock = stack.enter_context(socket.socket(family, kind))
                if family == socket.AF_INET6:
                    sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                sock.bind(("", 18443))
                if kind == socket.SOCK_STREAM:
                    sock.listen()
                sock.setblocking(False)
                heard.append(sock)
            with closing(socket.create_connection(("127.0.0.1", 18443), 2)) as control:
                assert control.getpeername() and heard[0].accept()
            targets = [f"{address}:{port}" for address in [its.host_address, others.host_address, *host_addresses]
                       for port in (18443,)]  # fmt: skip
            targets += [f"{its.host_address}:{port}" for port in (22, 853, 8080)]
            targets += [f"{others.host_address}:{port}" for port in (80, 443, 3128)]
            targets += [f"{others.guest_address}:22", "192.0.2.1:80", "192.0.2.53:53", "198.51.100.1:853"]
            targets += ["2001:db8::1:80", "fe80::1:80", "::ffff:192.0.2.1:443"]
            lines = guest.root(f"""python3 - {" ".join(targets)} <<'EOF'\n{CONNECT}\nEOF""").splitlines()
            assert len(lines) == len(targets)
            assert [line for line in lines if "REACHED" in line] == []
            for sock in heard:
                with pytest.raises(BlockingIOError):
                    sock.accept() if sock.type == socket.SOCK_STREAM else sock.recv(10)
    finally:
        guest.root(
            "ip route del default; ip -6 addr flush dev eth0; echo 1 > /proc/sys/net/ipv6/conf/eth0/disable_ipv6",
            check=False,
        )


def test_no_forged_frame_passes_the_tap(guest: RootedGuest, other: RootedGuest) -> None:
    its, others = card(guest), card(other)
    marker = uuid.uuid4().hex[:12]
    words = [its.mac, its.guest_address, its.bridge_mac, its.host_address, marker,
             others.host_address, others.guest_address, ADDRESS]  # fmt: skip
    with (
        Listener(its.tap) as sent,
        Listener(its.bridge) as passed,
        Listener(others.bridge) as others_bridge,
        Listener(others.tap) as others_tap,
        Listener("lo") as loopback,
    ):
        said = guest.root(f"""python3 - eth0 {" ".join(words)} <<'EOF'\n{ATTACK}\nEOF""")
    attacks, _, control = said.partition("# control\n")
    allowed = set(control.splitlines())
    assert len(attacks.splitlines()) > 100 and len(allowed) == 2
    # A real switch never forwards some frames; the tap has seen them all.
    assert sent.marked(marker) == set(attacks.splitlines()) | allowed
    assert passed.marked(marker) == allowed, "the bridge saw what it must not see"
    for nobody in (others_bridge, others_tap, loopback):
        assert nobody.marked(marker) == set()


def _is_its_own(frame: bytes, its: CardPlan) -> bool:
    """A frame with the guest's true addresses, such as the answer to an ARP request of the host's."""
    at = 28 if frame[12:14] == b"\x08\x06" else 26  # of the sender's address in ARP, in IP
    return frame[6:12] == bytes.fromhex(its.mac.replace(":", "")) and frame[at : at + 4] == socket.inet_aton(
        its.guest_address
    )


def test_another_address_or_mac_silences_only_the_guest_itself(guest: RootedGuest) -> None:
    its = card(guest)
    try_all = " ".join(
        f"timeout 1 bash -c 'echo > /dev/tcp/{to}' &" for to in (f"{its.host_address}/3128", "192.0.2.1/80")
    )
    restore = (
        f"ip link set eth0 address {its.mac}; ip addr flush dev eth0; ip neigh flush all; "
        f"ip addr add {its.guest_address}/30 dev eth0"
    )
    for change in (
        "ip link set eth0 address 52:54:00:12:34:56",
        f"ip addr flush dev eth0; ip addr add {its.host_address}/30 dev eth0; ip route add 192.0.2.0/24 dev eth0",
        "ip addr flush dev eth0; ip addr add 192.0.2.7/24 dev eth0; "
        f"ip route add {its.host_address} dev eth0; ip neigh add {its.host_address} lladdr {its.bridge_mac} dev eth0",
    ):
        with Listener(its.tap) as sent, Listener(its.bridge) as passed:
            guest.root(f"{change}; {try_all} wait; {restore}")
        forged = {where: [frame for frame in listener.frames if not _is_its_own(frame, its)]
                  for where, listener in (("sent", sent), ("passed", passed))}  # fmt: skip
        assert forged["sent"] and not forged["passed"], change
    assert guest.run("python3", "-c", FETCH, f"https://{ALLOWED}/again").stdout.startswith(b"GET /again")


def test_nobody_else_reaches_the_broker(guest: RootedGuest) -> None:
    """Neither a program on this host, whose requests the broker would put the session's secrets into."""
    its = card(guest)
    for port in (3128, 443, 80, 53):
        with closing(socket.socket()) as sock:
            sock.settimeout(0.7)
            assert sock.connect_ex((its.host_address, port)) != 0


def test_the_host_does_not_connect_to_the_guest(guest: RootedGuest) -> None:
    its = card(guest)
    listen = f"""import socket
server = socket.create_server(("{its.guest_address}", 7777))
open("/run/listens", "w").close()
server.settimeout(4)
try:
    said = f"REACHED {{server.accept()[1]}}"
except TimeoutError:
    said = "nobody"
open("/run/heard", "w").write(said)
"""
    guest.root(
        f"setsid python3 - > /dev/null 2>&1 <<'EOF' &\n{listen}EOF\nuntil [ -e /run/listens ]; do sleep 0.05; done"
    )
    with closing(socket.socket()) as sock:
        sock.settimeout(2)
        assert sock.connect_ex((its.guest_address, 7777)) != 0
    assert guest.root("until [ -s /run/heard ]; do sleep 0.05; done; cat /run/heard") == "nobody"


def test_a_broker_that_dies_leaves_its_ports_to_nobody(make: Callable[[], RootedGuest]) -> None:
    guest = make()
    its = card(guest)
    keeper = json.loads((guest.folder.path / "keeper.json").read_text())["pid"]
    brokers = [
        int(pid) for task in Path(f"/proc/{keeper}/task").iterdir() for pid in (task / "children").read_text().split()
    ]
    assert brokers
    for pid in brokers:
        os.kill(pid, 9)
    targets = " ".join(f"{its.host_address}:{port}" for port in (3128, 443, 80, 53))
    lines = wait_for(
        lambda: [line for line in [guest.root(f"python3 - {targets} <<'EOF'\n{CONNECT}\nEOF")] if "REACHED" not in line]
    )[0].splitlines()
    assert [line.split()[1] for line in lines] == ["ECONNREFUSED"] * 4
    with closing(socket.socket()) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        with pytest.raises(OSError, match=os.strerror(errno.EADDRINUSE)):
            sock.bind(("", 3128))
    # and the watch goes on
    subprocess.run(["ip", "link", "set", its.tap, "nomaster"], check=True)
    _frozen_within(guest, 2.0)
    guest.stop()
    wait_for(lambda: not traces(its), timeout=15)


def _frozen_within(guest: Guest, seconds: float) -> dict[str, Any]:
    """The event of the freeze."""
    host = Host.open()
    began = time.monotonic()
    try:
        while host.is_running(guest.info.uuid):
            assert time.monotonic() - began < seconds, "not frozen"
            time.sleep(0.02)
    finally:
        host.close()
    frozen = wait_for(lambda: [event for event in guest.journal() if event["kind"] == "guest.frozen"], timeout=5)
    assert frozen[0]["data"]["by"] == "network"
    return dict(frozen[0]["data"])


def test_a_guest_whose_rules_are_gone_is_frozen_at_once(other: RootedGuest) -> None:
    its = card(other)
    subprocess.run(["nft", "delete", "table", "bridge", its.table], check=True)
    assert its.table in _frozen_within(other, 2.0)["reason"]
    thawed = other.cli("thaw", other.name, status=None)
    assert thawed.returncode != 0, "it must not go on without its rules"
    other.stop()
    wait_for(lambda: not traces(its), timeout=15)


def test_nothing_is_left_of_a_session(guest: RootedGuest) -> None:
    its = card(guest)
    assert len(traces(its)) == 6
    guest.stop()
    wait_for(lambda: not traces(its), timeout=15)


MAKE_AND_DIE = """
import os, sys
from pathlib import Path
from vmsandbox.errors import RefusedError
from vmsandbox.hypervisor.connection import Host
from vmsandbox.paths import Layout
from vmsandbox.process import Programs
from vmsandbox.session.network.filtered import open_card
from vmsandbox.ledger.processes import process_started
from vmsandbox.session.state.folder import SessionFolder
from vmsandbox.session.state.info import SessionInfo, new_session_id
layout = Layout.from_environment()
info = SessionInfo(id=new_session_id("dead"), name=sys.argv[1], uuid="00000000-1111-4222-8333-444444444444",
                   domain="x", created="",
                   owner_pid=os.getpid(), owner_started=process_started(os.getpid()), image="base",
                   image_digest="", template="", ssh_ports=1, memory_mib=1, vcpus=1, network="filtered")
folder = SessionFolder(layout, sys.argv[1])
folder.claim(info)
print(open_card(folder, info, Programs(), Host.open()).plan.name, flush=True)
os.kill(os.getpid(), 9)
"""


@pytest.mark.parametrize("lost", ["nothing", "its record", "its network, in libvirt"])
def test_gc_removes_what_a_killed_process_has_made(cli: Cli, lost: str) -> None:
    name = f"dead-{uuid.uuid4().hex[:6]}"
    done = subprocess.run([sys.executable, "-c", MAKE_AND_DIE, name], env=cli.environment, capture_output=True,
                          text=True, timeout=60)  # fmt: skip
    assert done.returncode == -9, done.stderr
    network = done.stdout.strip()
    assert network.startswith(name_prefix(cli.layout.live))
    assert table_of(network) in subprocess.run(["nft", "list", "tables"], capture_output=True, text=True).stdout
    if lost == "its record":
        shutil.rmtree(cli.layout.live / name)
    elif lost == "its network, in libvirt":  # as when libvirtd is killed before it has written that down
        subprocess.run(["virsh", "net-destroy", network], check=True, capture_output=True)
        subprocess.run(["ip", "link", "add", bridge_of(network), "type", "bridge"], check=True)
    assert name in (said := cli("gc").stdout.decode()) or network in said
    host = Host.open()
    try:
        assert network not in host.network_names()
    finally:
        host.close()
    assert table_of(network) not in subprocess.run(["nft", "list", "tables"], capture_output=True, text=True).stdout
    assert not Path("/sys/class/net", bridge_of(network)).exists()
    assert cli("gc").stdout == b""


def test_without_root_it_is_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RefusedError, match="needs root") as refused:
        refuse_where_impossible("qemu:///session")
    assert "qemu:///session" in refused.value.details and "--net proxy" in refused.value.resolution
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(RefusedError, match="needs root"):
        refuse_where_impossible("qemu:///system")
