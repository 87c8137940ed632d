"""`--net proxy` on a real guest: what is allowed works, what is not says why, and guest root changes nothing of it."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
from harness import Cli, wait_for
from netted import ASK, FETCH, LISTEN, SECRET, ask, broker_of, fetch, keeper_of, lines, reaching
from rooted import RootedGuest, with_root
from upstream import EVENT_SECONDS, EVENTS, Upstream

from vmsandbox.errors import GuestError
from vmsandbox.policy.load import load_policy
from vmsandbox.session.asked.request import SessionRequest
from vmsandbox.session.opening import plan
from vmsandbox.session.sandbox import Sandbox


@pytest.fixture(scope="module")
def net(netcli: Cli, netted_project: Path) -> Iterator[RootedGuest]:
    """A started guest with a keeper, whose root is in the test's hands."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "confinement_of", with_root)
        for name, value in netcli.env.items():
            patch.setenv(name, value)
        request = SessionRequest(name="netted", allow_emulation=True, keep=True)
        policy = load_policy(netted_project / ".claude/sandbox.yaml")
        Sandbox.open(netted_project, policy=policy, request=request, layout=netcli.layout).disconnect()
    guest = RootedGuest(netcli, "netted")
    yield guest
    guest.stop()


def test_there_is_still_no_card_and_the_policy_chose_the_mode(net: RootedGuest) -> None:
    assert net.info.network == "proxy"
    assert net.sh("ls /sys/class/net") == "lo"
    assert next(entry["data"] for entry in net.journal() if entry["kind"] == "egress.opened")["mode"] == "proxy"


def test_https_works_for_the_worker_and_for_root(net: RootedGuest, upstream: Upstream) -> None:
    """With checked certificates: the session's authority is in every place where a tool looks."""
    url = f"https://allowed.test:{upstream.port}/echo"
    assert fetch(net, url) == ("200", f"GET /echo allowed.test:{upstream.port}")
    net.root(f"cat > /tmp/fetch.py <<'EOF'\n{FETCH}\nEOF\n")
    assert net.root(f"bash -lc 'python3 /tmp/fetch.py {url}'").startswith("200 GET /echo")


def test_a_repository_is_cloned_over_https(net: RootedGuest, upstream: Upstream) -> None:
    url = f"https://allowed.test:{upstream.port}/repo.git"
    assert net.sh('cd "$(mktemp -d)" && git clone -q "$1" c && cat c/cloned.txt', url) == "over HTTPS"
    # Root's git has no variable that tells it: only /etc/gitconfig.
    assert net.root(f"env | grep -ci proxy; cd /tmp && git clone -q {url} r && cat r/cloned.txt") == "0\nover HTTPS"


def test_events_arrive_as_they_are_sent(net: RootedGuest, upstream: Upstream) -> None:
    done = net.run("python3", "-c", LISTEN, f"https://api.test:{upstream.port}/events")
    at = [float(line) for line in done.stdout.split()]
    assert len(at) == EVENTS
    gaps = [later - earlier for earlier, later in pairwise(at)]
    assert min(gaps) > EVENT_SECONDS / 2, f"they came together: {at}"


def test_a_refusal_says_why_in_the_guest_and_on_the_host(net: RootedGuest) -> None:
    status, body = fetch(net, "http://refused.test/some/path")
    answer = json.loads(body)
    assert status == "403" and answer["rule"] == "default-deny" and "refused.test" in answer["remedy"]
    wait_for(lambda: [line for line in lines(net) if line["host"] == "refused.test"], timeout=1)
    journal = [entry["data"] for entry in net.journal() if entry["kind"] == "egress.refused"]
    assert {"refused.test"} <= {entry["host"] for entry in journal}
    shown = net.cli("logs", net.name, "--egress").stdout.decode()
    assert "refused   GET refused.test:80/some/path 403 [default-deny]" in shown
    parsed = [json.loads(line) for line in net.cli("logs", net.name, "--egress", "--json").stdout.splitlines()]
    assert parsed == lines(net)


def test_many_refusals_of_a_kind_are_few_records(net: RootedGuest) -> None:
    def count() -> int:
        return sum(entry["data"].get("host") == "loud.test" for entry in net.journal())

    net.run(
        "python3", "-c", ASK, json.dumps([["GET http://loud.test/ HTTP/1.1\r\nHost: loud.test\r\n\r\n", None, ""]] * 30)
    )
    wait_for(lambda: sum(int(line["more"].get("count", 1)) for line in lines(net) if line["host"] == "loud.test") == 30)
    assert 1 <= count() <= 3


def attacks(port: int) -> dict[str, tuple[str, str | None, str]]:
    """Ways out that guest root tries: what is sent first, the TLS name, what is sent in it."""

    def connect(target: str) -> str:
        return f"CONNECT {target} HTTP/1.1\r\nHost: {target}\r\n\r\n"

    def plain(target: str, host: str | None = None) -> str:
        return f"GET http://{target}/ HTTP/1.1\r\nHost: {host or target}\r\n\r\n"

    good = f"allowed.test:{port}"
    get = f"GET / HTTP/1.1\r\nHost: {good}\r\nConnection: close\r\n\r\n"
    return {
        "a suffix": (connect(f"allowed.test.evil.test:{port}"), "allowed.test.evil.test", get),
        "a prefix": (connect(f"evilallowed.test:{port}"), "evilallowed.test", get),
        "a NUL": (connect(f"allowed.test\0.evil.test:{port}"), None, ""),
        "another port": (connect("allowed.test:22"), None, ""),
        "loopback": (connect(f"127.0.0.1:{port}"), None, ""),
        "short loopback": (connect(f"127.1:{port}"), None, ""),
        "a number": (connect(f"0x7f000001:{port}"), None, ""),
        "mapped metadata": (connect("[::ffff:169.254.169.254]:443"), None, ""),
        "a zone": (connect("[fe80::1%25eth0]:443"), None, ""),
        "metadata": (plain("169.254.169.254"), None, ""),
        "the server's address": (connect(f"127.0.0.77:{port}"), None, ""),
        "another SNI": (connect(good), "other.test", get),
        "no SNI": (connect(good), "", get),
        "another Host": (connect(good), "allowed.test", get.replace("Host: allowed.test", "Host: other.test")),
        "no TLS": (connect(good) + get, None, ""),
        "another Host in the open": (plain(f"refused.test:{port}", good), None, ""),
    }


def test_guest_root_finds_no_other_way(net: RootedGuest, upstream: Upstream) -> None:
    cases = attacks(upstream.port)
    before = len(upstream.seen)
    answers = dict(zip(cases, ask(net, *cases.values()), strict=True))
    for name, answer in answers.items():
        assert not answer.startswith("HTTP/1.1 200") or name == "no TLS", (name, answer)
    assert len(upstream.seen) == before, (answers, upstream.seen[before:])
    good = f"CONNECT allowed.test:{upstream.port} HTTP/1.1\r\n\r\n"
    inside = f"GET /root HTTP/1.1\r\nHost: allowed.test:{upstream.port}\r\nConnection: close\r\n\r\n"
    assert "GET /root" in ask(net, (good, "allowed.test", inside))[0], "or the cases above show nothing"


def test_guest_root_gains_nothing_from_what_it_can_change(net: RootedGuest) -> None:
    net.root("nft flush ruleset 2>/dev/null; ip route add default dev lo 2>/dev/null; true")
    assert net.root(reaching("192.0.2.1/80", "127.0.0.77/80", "2001:db8::1/80")) == ""
    net.root("ip route del default dev lo 2>/dev/null; true")


def test_no_other_port_of_the_guest_leads_to_the_host(net: RootedGuest, tmp_path: Path) -> None:
    config = tmp_path / "config"
    config.write_bytes(net.cli("ssh-config", net.name).stdout)
    ssh = ["ssh", "-F", str(config), "-o", "ExitOnForwardFailure=yes", f"vmsandbox-{net.name}"]

    def run(*options: str) -> subprocess.CompletedProcess[bytes]:
        command = [*ssh[:-1], *options, ssh[-1], "echo in"]
        return subprocess.run(command, capture_output=True, timeout=60, env=net.cli.environment)

    assert run().stdout == b"in\n"
    for listen in ("9000", "0.0.0.0:3128", "127.0.0.1:22"):
        assert run("-R", f"{listen}:127.0.0.1:22").returncode == 255, listen
    assert run("-L", "127.0.0.1:0:127.0.0.1:22").returncode in (0, 255)  # into the guest: as before


def test_a_secret_arrives_and_is_nowhere_in_the_guest(net: RootedGuest, upstream: Upstream) -> None:
    placeholder = net.sh("echo $TEST_API_KEY")
    assert placeholder.startswith("vmsandbox-placeholder-") and SECRET not in placeholder
    url = f"https://api.test:{upstream.port}/secret"
    assert fetch(net, url, f"x-api-key={placeholder}")[0] == "200"
    assert [headers["x-api-key"] for headers in upstream.of("/secret")] == [SECRET]
    for url, header in (
        (f"https://allowed.test:{upstream.port}/wrong", "x-api-key"),
        (f"https://api.test:{upstream.port}/wrong", "x-other"),
    ):
        assert fetch(net, url, f"{header}={placeholder}")[0] == "403", (url, header)
    assert upstream.of("/wrong") == []
    memory = guest_memory(net.qemu)
    assert placeholder.encode() in memory, "or this search finds nothing at all"
    assert SECRET.encode() not in memory
    layout, keeper = net.cli.layout, keeper_of(net)
    files = [path for folder in (net.folder.path, net.folder.record_folder(net.info.id), layout.run / net.name)
             for path in folder.rglob("*") if path.is_file()]  # fmt: skip
    files += [Path(f"/proc/{keeper}/cmdline"), Path(f"/proc/{keeper}/environ")]
    files += [Path(f"/proc/{broker_of(keeper)}/{name}") for name in ("cmdline", "environ")]
    assert len(files) > 8
    for path in files:
        assert SECRET.encode() not in path.read_bytes(), path


def guest_memory(pid: int) -> bytes:
    """All that a guest's QEMU has in memory of its guest: the mappings of the guest's size."""
    with Path(f"/proc/{pid}/maps").open() as maps, open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
        for line in maps:
            start, end = (int(number, 16) for number in line.split()[0].split("-"))
            if end - start >= 500 << 20 and line.split()[1].startswith("rw"):
                memory.seek(start)
                read = bytearray()
                while len(read) < end - start and (piece := memory.read(min(64 << 20, end - start - len(read)))):
                    read += piece
                return bytes(read)
    raise AssertionError("no mapping of the guest's memory")


def test_a_canary_is_refused_and_an_alert(net: RootedGuest, upstream: Upstream) -> None:
    token = net.sh("sed -n 's/aws_secret_access_key = //p' ~/.aws/credentials")
    assert len(token) == 40
    status, body = fetch(net, f"https://allowed.test:{upstream.port}/leak", f"BODY=look: {token}")
    assert status == "403", body
    assert upstream.of("/leak") == []
    alerts = [entry["data"] for entry in net.journal() if entry["kind"] == "egress.alert"]
    assert alerts and alerts[-1]["host"] == "allowed.test" and "canary" in json.dumps(alerts[-1])
    # The decoys are no part of the project.
    assert b"no changes" in net.cli("changes", net.name).stdout


def test_a_broken_connection_is_made_again(net: RootedGuest, upstream: Upstream) -> None:
    url = f"https://allowed.test:{upstream.port}/echo"
    before = lost(net)
    net.root("nohup sh -c 'sleep 2; pkill sshd' > /dev/null 2>&1 &")
    wait_for(lambda: lost(net) > before, timeout=20)
    wait_for(lambda: fetch_quietly(net, url) == "200", timeout=60)


def lost(guest: RootedGuest) -> int:
    """How often the guest's keeper has logged in again."""
    keeper_log = guest.folder.path / "keeper.log"
    return keeper_log.read_text().count("logs in again")


def fetch_quietly(guest: RootedGuest, url: str) -> str:
    try:
        done = guest.run("python3", "-c", FETCH, url, status=None)
    except GuestError as error:
        guest.hang_up()  # its own sshd was one of those that went
        return error.brief
    return done.stdout.decode().partition(" ")[0]
