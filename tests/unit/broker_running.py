"""Runs the real broker process for tests, and uses it as a guest would.

The broker's environment is made once for all tests (VMSANDBOX_TEST_BROKER_ENV names one that is there already).
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from broker_servers import Authority, Http2Server, NameServer, Server, authority

from vmsandbox.broker.environment import make_environment
from vmsandbox.broker.start import Broker, Listeners, start_broker
from vmsandbox.egress.values import BrokerConfig, Dlp, EgressEvent, EgressLimits, EgressPolicy, HostRule
from vmsandbox.monitor import Monitor
from vmsandbox.paths import Layout
from vmsandbox.process import Programs

__all__ = ["QUIET", "Authority", "Http2Server", "NameServer", "Running", "Server", "authority", "broker_environment",
           "one_answer", "rule", "running", "told"]  # fmt: skip
HOME = Path(os.environ.get("VMSANDBOX_TEST_HOME", "/var/tmp/vmsandbox-test")).absolute()
QUIET = Dlp(secrets=False, canaries=False)


def broker_environment() -> Path:
    """The environment for all tests."""
    if named := os.environ.get("VMSANDBOX_TEST_BROKER_ENV"):
        return Path(named)
    cache = HOME / "cache"
    if not os.access(HOME.parent, os.W_OK):
        cache = Path(f"/var/tmp/vmsandbox-test-{os.getuid()}") / "cache"
    base = dict.fromkeys(("images", "templates", "live", "records", "run", "config"), cache)
    return make_environment(Layout(**base, cache=cache), Programs(), Monitor())


@dataclass
class Running:
    """A broker that runs, and how to use it as a guest would."""

    broker: Broker
    events: list[EgressEvent]
    folder: Path
    ca: Path
    proxy: str
    transparent: dict[int, tuple[str, int]] = field(default_factory=dict)
    dns: tuple[str, int] | None = None

    def curl(self, *argv: str, timeout: float = 15, proxy: bool = True) -> subprocess.CompletedProcess[bytes]:
        """curl as a guest has it: the proxy and the session's authority."""
        base = ["curl", "-q", "-sS", "--cacert", str(self.ca), "--max-time", str(timeout)]
        if proxy:
            base += ["-x", self.proxy]
        return subprocess.run(
            [*base, *argv], capture_output=True, timeout=timeout + 5, env={"PATH": os.environ["PATH"]}
        )

    def status(self, *argv: str, **more: object) -> tuple[int, dict[str, object]]:
        """Status of the answer to a request (of CONNECT, if that was refused), and the JSON of its body."""
        done = self.curl("-w", "\n%{http_code} %{http_connect}", *argv, **more)  # type: ignore[arg-type]
        body, _, codes = done.stdout.decode().rpartition("\n")
        code, connect = map(int, codes.split())
        try:
            told = json.loads(body)
        except ValueError:
            told = {}
        return (connect if connect >= 300 else code), told

    def connect(self) -> socket.socket:
        """A connection to the proxy's door."""
        host, _, port = self.proxy.removeprefix("http://").rpartition(":")
        return socket.create_connection((host, int(port)), timeout=10)

    def event(self, timeout: float = 3, **wanted: object) -> EgressEvent:
        """The first event with these values, once it is there."""
        deadline = time.monotonic() + timeout
        while True:
            for event in list(self.events):
                if all(getattr(event, name) == value for name, value in wanted.items()):
                    return event
            if time.monotonic() > deadline:
                raise AssertionError(f"no event {wanted} in {self.events}")
            time.sleep(0.02)


def told(sock: socket.socket, seconds: float = 10) -> bytes:
    """All that comes until the other side closes."""
    sock.settimeout(seconds)
    found = b""
    with suppress(ConnectionError):
        while data := sock.recv(65536):
            found += data
    return found


def one_answer(sock: socket.socket) -> bytes:
    """One answer with a content-length, and not a byte more."""
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        byte = sock.recv(1)
        assert byte, head
        head += byte
    length = int(
        next(line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length")).split(b":")[1]
    )
    body = b""
    while len(body) < length:
        body += sock.recv(length - len(body))
    return head + body


def rule(pattern: str, *ports: int, addresses: tuple[str, ...] = (), **more: object) -> HostRule:
    """An allow rule."""
    return HostRule(pattern, ports or (80, 443), addresses=addresses, source=f"rules[{pattern}]", **more)  # type: ignore[arg-type]


@contextmanager
def running(
    folder: Path,
    session: Authority,
    bundle: Path,
    *allow: HostRule,
    deny: tuple[HostRule, ...] = (),
    dlp: Dlp = QUIET,
    limits: EgressLimits | None = None,
    resolver: tuple[str, ...] = ("127.0.0.1:1",),
    transparent: tuple[int, ...] = (),
    dns: bool = False,
    own_addresses: tuple[str, ...] = (),
    learn: bool = False,
    ready: bool = True,
) -> Iterator[Running]:
    """A broker with this policy. Its resolver answers nothing unless one is named."""
    policy = EgressPolicy(
        allow=allow, deny=deny, dlp=dlp, limits=limits or EgressLimits(), resolver=resolver, learn=learn
    )
    config = BrokerConfig("test", policy, {}, (), session.certificate, session.key, own_addresses)
    sockets = {port: _listening() for port in transparent}
    door = _listening()
    udp = tcp = None
    if dns:
        tcp = _listening()
        udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        udp.bind(tcp.getsockname())
    events: list[EgressEvent] = []
    broker = start_broker(
        config, Listeners(door, sockets, udp, tcp), broker_environment(), Programs(), events.append, ca_bundle=bundle
    )
    try:
        found = Running(
            broker, events, folder, session.file(folder), f"http://127.0.0.1:{door.getsockname()[1]}",
            {port: sock.getsockname() for port, sock in sockets.items()}, tcp.getsockname() if tcp else None,
        )  # fmt: skip
        for sock in (door, *sockets.values(), *(one for one in (udp, tcp) if one)):
            sock.close()
        if ready:
            assert broker.wait_ready(30), (broker._said, events)
        yield found
    finally:
        broker.stop()


def _listening() -> socket.socket:
    return socket.create_server(("127.0.0.1", 0), backlog=128)
