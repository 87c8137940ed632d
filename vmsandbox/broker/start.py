"""Starts a broker, hears what it did, and ends it; the session's side of the broker's process.

Without it nothing would tie the broker's life to its session: a broker that outlives it would be a way out for nobody
to see, and one that dies unnoticed would leave a guest without a network and a person without a reason.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from vmsandbox.broker.environment import site_packages
from vmsandbox.egress.values import BrokerConfig, EgressEvent, EgressKind
from vmsandbox.egress.wire import config_to_json, parse_untrusted_event
from vmsandbox.errors import HostError, VmsandboxError
from vmsandbox.process import Piped, Programs

# -I, -S: no environment, no user's site folder, no .pth file. Of the folder that vmsandbox lies in only vmsandbox
# can be imported: what is installed beside it is of other versions than the broker's own environment.
_START = """
import sys, importlib.util, os
os.nice(5)  # its imports must not take the processor from the guest that is starting
class OnlyVmsandbox:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == "vmsandbox":
            return importlib.util.spec_from_file_location(
                name, os.path.join(sys.argv[1], "__init__.py"), submodule_search_locations=[sys.argv[1]])
sys.meta_path.insert(0, OnlyVmsandbox)
sys.path.append(sys.argv[2])
from vmsandbox.broker.lean import leave_quic_out
leave_quic_out()
from vmsandbox.broker.child import main
main()
"""
_UID_BASE, _UID_RANGE = 0x70000000, 0x0FFFFFFE  # assigned to nothing (systemd's UIDS-GIDS document)
_LINE = 64 << 10  # bytes of one event at most
_EVENT_BYTES_PER_SECOND, _EVENT_BURST = 1 << 20, 16 << 20  # read no faster: the broker waits, and with it the guest
_STOP_SECONDS = 3
# Where distributions keep it: Debian's comes first.
_BUNDLES = tuple(
    map(Path, ("/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt", "/etc/ssl/cert.pem"))
)


@dataclass(frozen=True)
class Listeners:
    """The sockets that the broker accepts on, all listening (or bound) already.

    proxy: stream, TCP or unix. transparent: port that clients believe they reach → TCP socket.
    dns_udp, dns_tcp: where names are asked; answers name the address that the socket is bound to.
    """

    proxy: socket.socket
    transparent: Mapping[int, socket.socket] = field(default_factory=dict)
    dns_udp: socket.socket | None = None
    dns_tcp: socket.socket | None = None


class Broker:
    """A broker's process. It ends with this process, with `stop`, or by itself (then an event says so)."""

    def __init__(self, on_event: Callable[[EgressEvent], None]) -> None:
        self.pid = 0
        self.status: int | None = None
        self._on_event = on_event
        self._started = threading.Event()
        self._ready = threading.Event()
        self._ended = threading.Event()
        self._stopping = False
        self._stdin: IO[bytes] | None = None
        self._said = bytearray()
        self._error: HostError | None = None

    @property
    def alive(self) -> bool:
        """Whether the process runs."""
        return not self._ended.is_set()

    def wait_ready(self, timeout: float) -> bool:
        """Wait until it answers (or has ended); whether it answers. Nobody has to: connections wait in its backlog."""
        deadline = time.monotonic() + timeout
        while not self._ready.wait(0.02) and self.alive and time.monotonic() < deadline:
            pass
        return self._ready.is_set() and self.alive

    def wait(self, timeout: float) -> bool:
        """Wait until it has ended and its last event was told; whether it has."""
        return self._ended.wait(timeout)

    def stop(self) -> None:
        """End it: its last events are told before this returns. Never raises; a second time does nothing."""
        self._stopping = True
        if self._stdin is not None:
            with suppress(OSError, ValueError):
                self._stdin.close()
        if not self._ended.wait(_STOP_SECONDS) and self.pid:
            with suppress(ProcessLookupError):
                os.kill(self.pid, 9)
            self._ended.wait(_STOP_SECONDS)

    def _live(self, programs: Programs, argv: list[str | Path], fds: list[int], told: bytes) -> None:
        """The thread's whole life is the process's: a process with PDEATHSIG dies with the thread that started it."""
        try:
            with programs.piped(argv, pass_fds=fds) as child:
                self.pid, self._stdin = child.pid, child.stdin
                words = threading.Thread(target=self._keep_last_words, args=(child.stderr,), daemon=True)
                words.start()
                self._started.set()
                _write(child.stdin, told)  # may wait until the child reads
                self._hear(child)
                words.join(1)
        except HostError as error:
            self._error = error
        finally:
            self._started.set()
            self._tell_end()
            self._ended.set()

    def _hear(self, child: Piped) -> None:
        """Pass events on until the process is gone. What is no event ends it: it is not the broker any more."""
        try:
            for line in _lines(child.stdout):
                event = parse_untrusted_event(line)
                if event.kind is EgressKind.READY:
                    self._ready.set()
                self._on_event(event)
        except VmsandboxError as error:
            self._said += f"\nit said what is no event: {error.brief}".encode()
            with suppress(ProcessLookupError):
                os.kill(child.pid, 9)
        with suppress(HostError):
            self.status = child.wait(_STOP_SECONDS)

    def _keep_last_words(self, stderr: IO[bytes]) -> None:
        while said := stderr.read(4096):
            self._said += said
            del self._said[:-4000]

    def _tell_end(self) -> None:
        if self._stopping:
            return
        words = bytes(self._said).decode("utf-8", "replace").strip()
        reason = f"the broker has ended (status {self.status}); nothing of the guest's reaches the network any more"
        more = {"details": words[-2000:]} if words else {}
        event = EgressEvent(EgressKind.FAILED, time.time(), rule="broker-ended", reason=reason, more=more)
        with suppress(Exception):  # the thread's end must be told to those who wait, whatever a listener raises
            self._on_event(event)


def start_broker(
    config: BrokerConfig,
    listeners: Listeners,
    environment: Path,
    programs: Programs,
    on_event: Callable[[EgressEvent], None],
    *,
    ca_bundle: Path | None = None,
) -> Broker:
    """Start a broker. It is not ready yet when this returns; connections wait in the sockets' backlog.

    Args:
        config: all that it decides by, with the secrets; goes through a pipe and is nowhere else.
        listeners: may be closed here once this has returned.
        environment: of `vmsandbox.broker.environment`.
        on_event: called from a thread of the broker's own, one event after the other.
        ca_bundle: PEM of the authorities that servers are checked against; None: SSL_CERT_FILE, else the system's.

    Raises:
        HostError: the process could not be started, or there is no such bundle.
    """
    sockets = {"proxy": listeners.proxy.fileno()}
    sockets |= {f"transparent:{port}": sock.fileno() for port, sock in listeners.transparent.items()}
    sockets |= {name: sock.fileno() for name, sock in (("dns_udp", listeners.dns_udp), ("dns_tcp", listeners.dns_tcp))
                if sock is not None}  # fmt: skip
    told = {
        "config": config_to_json(config).decode("ascii"),
        "ca_bundle": str(ca_bundle or _system_bundle()),
        "user": _UID_BASE + secrets.randbelow(_UID_RANGE) if os.geteuid() == 0 else None,
        "sockets": sockets,
        "parent": os.getpid(),
        "readable": [str(environment), str(Path(__file__).resolve().parents[1])],
    }
    package = Path(__file__).resolve().parents[1]
    argv: list[str | Path] = [
        environment / "bin" / "python", "-I", "-S", "-c", _START, package, site_packages(environment),
    ]  # fmt: skip
    broker = Broker(on_event)
    line = json.dumps(told).encode("ascii") + b"\n"
    life = threading.Thread(target=broker._live, args=(programs, argv, list(sockets.values()), line), daemon=True)
    life.start()
    broker._started.wait()
    if broker._error is not None:
        raise broker._error
    return broker


def _system_bundle() -> Path:
    named = os.environ.get("SSL_CERT_FILE")
    found = next((path for path in ([Path(named)] if named else _BUNDLES) if path.is_file()), None)
    if found is None:
        raise HostError(
            "there is no bundle of certificate authorities to check servers against",
            details=named or ", ".join(map(str, _BUNDLES)),
            resolution="install ca-certificates, or name a bundle in SSL_CERT_FILE",
        )
    return found


def _write(pipe: IO[bytes], data: bytes) -> None:
    """All of it; a reader that is gone shows in its exit status."""
    view = memoryview(data)
    with suppress(OSError):
        while view:
            view = view[pipe.write(view) :]


def _lines(pipe: IO[bytes]) -> Iterator[bytes]:
    """Lines of at most `_LINE` bytes, no faster than the rate; raises HostError for a longer one."""
    rest = b""
    allowance, since = float(_EVENT_BURST), time.monotonic()
    while data := pipe.read(_LINE):
        now = time.monotonic()
        allowance = min(_EVENT_BURST, allowance + (now - since) * _EVENT_BYTES_PER_SECOND) - len(data)
        since = now
        if allowance < 0:
            time.sleep(-allowance / _EVENT_BYTES_PER_SECOND)
        *whole, rest = (rest + data).split(b"\n")
        yield from whole
        if len(rest) > _LINE:
            raise HostError("a line without an end")
