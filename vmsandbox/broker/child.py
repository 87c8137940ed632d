"""The broker's process: reads its configuration, gives its rights up, serves until its standard input ends.

Everything is imported and read before the rights are gone; from then on the process is what a guest talks to.
"""

from __future__ import annotations

import asyncio
import encodings.idna
import encodings.punycode  # noqa: F401 - needed later, when nothing more can be opened
import gc
import json
import logging
import os
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NoReturn

from vmsandbox.broker import bounds, confine, dns
from vmsandbox.broker.answers import Refusal
from vmsandbox.broker.certificates import Certificates
from vmsandbox.broker.dial import Dialer
from vmsandbox.broker.failures import say, say_failure
from vmsandbox.broker.inside import Inside
from vmsandbox.broker.proxy import GuestConnection
from vmsandbox.broker.record import Bucket, Recorder
from vmsandbox.broker.resolve import Resolver
from vmsandbox.broker.service import Door, Service
from vmsandbox.egress.decide import Rules
from vmsandbox.egress.values import BrokerConfig, EgressEvent, EgressKind
from vmsandbox.egress.wire import config_from_json

_TOLD = 32 << 20  # bytes of the configuration at most
_THREADS = 4  # that look names and large bodies up
_MEMORY = 1 << 30  # bytes of address space, beside what requests may keep
_BACKLOG = 128
# What the C library needs to resolve a name (nsswitch.conf(5), resolv.conf(5), gai.conf(5)), and to load what does it.
_RESOLVING = ("/etc/resolv.conf", "/etc/hosts", "/etc/nsswitch.conf", "/etc/gai.conf", "/etc/host.conf",
              "/etc/ld.so.cache", "/usr/lib", "/lib", "/lib64", "/run/systemd/resolve", "/run/resolvconf")  # fmt: skip


def main() -> NoReturn:
    """The process. Its standard input has one line of JSON (`start.start_broker`), and ends when it has to end."""
    logging.basicConfig(level=logging.CRITICAL)  # messages of libraries may hold what passes
    os.environ["LOCALDOMAIN"] = ""  # resolv.conf(5): no search domain makes another name of one that was allowed
    events = os.dup(1)
    os.dup2(2, 1)  # what a library prints is no event
    status = 1
    try:
        told = json.loads(_read_line(0))
        confine.die_with_parent(int(told["parent"]))
        config = config_from_json(told["config"].encode("ascii"))
        serve = _prepare(config, told, Recorder(events))
        asyncio.run(serve)
        status = 0
    except BaseException as error:
        say(f"{type(error).__name__}: {error}")
    os._exit(status)  # no clean-up of an interpreter that may be full of a guest's values


def _prepare(config: BrokerConfig, told: dict[str, Any], recorder: Recorder) -> Any:
    """Read what has to be read, confine the process, and return what serves."""
    bounds.install()
    limits = config.policy.limits
    certificates = Certificates(config.ca_certificate, config.ca_key, Path(told["ca_bundle"]))
    rules, inside = Rules(config.policy), Inside(config)
    user = told["user"]
    readable = [Path(path) for path in (*told["readable"], *_RESOLVING, Path(os.__file__).parent)]
    in_force = confine.confine(user, readable, 64 + 8 * limits.connections, _MEMORY + 6 * limits.request_bytes)
    threads = ThreadPoolExecutor(_THREADS)
    all_there = threading.Barrier(_THREADS + 1)
    for _ in range(_THREADS):
        threads.submit(all_there.wait)
    all_there.wait()
    if user is not None:
        confine.no_more_processes()
    dialer = Dialer(rules, Resolver(config.policy.resolver, threads), config.own_addresses, limits.connect_seconds)
    rate = Bucket(limits.bytes_per_second, limits.bytes_per_second) if limits.bytes_per_second else None
    service = Service(config, rules, recorder, certificates, dialer, inside, rate)
    gc.freeze()
    return _serve(service, told["sockets"], threads, in_force)


async def _serve(service: Service, sockets: dict[str, int], threads: ThreadPoolExecutor, in_force: list[str]) -> None:
    loop = asyncio.get_running_loop()
    loop.set_default_executor(threads)
    loop.set_exception_handler(lambda _, what: say_failure("a task", what.get("exception")))
    over = asyncio.Event()
    loop.add_reader(0, over.set)  # nothing more is ever sent: readable means that it has ended
    for name, fd in sockets.items():
        await _listen(service, name, socket.socket(fileno=fd))
    watching = asyncio.create_task(_end_slow_ones(service))
    more = {"confined": " ".join(in_force)}
    service.recorder.tell(EgressEvent(EgressKind.READY, time.time(), via="proxy", more=more))
    await over.wait()
    watching.cancel()
    for guest in list(service.guests):
        guest.finish()
    service.recorder.flush()
    os._exit(0)


async def _listen(service: Service, name: str, sock: socket.socket) -> None:
    sock.setblocking(False)
    if name == "dns_udp":
        await dns.serve_udp(service, sock)
        return
    if name == "dns_tcp":
        await dns.serve_tcp(service, sock)
        return
    _, _, port = name.partition(":")
    door = Door(transparent=bool(port), port=int(port or 0))

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await _carry(service, door, reader, writer)

    if sock.family == socket.AF_UNIX:
        await asyncio.start_unix_server(accept, sock=sock, limit=1 << 18, backlog=_BACKLOG)
    else:
        await asyncio.start_server(accept, sock=sock, limit=1 << 18, backlog=_BACKLOG)


async def _carry(service: Service, door: Door, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """One connection, unless there are too many."""
    most = service.limits.connections
    if len(service.guests) >= most:
        reason = f"more than {most} connections at once"
        refusal = Refusal("limit-connections", reason, status=503)
        event = EgressEvent(EgressKind.LIMIT, time.time(), via=door.via, rule=refusal.rule, reason=reason, status=503)
        service.recorder.tell(event)
        writer.write(refusal.as_http1())
        writer.close()
        return
    guest = GuestConnection(reader, writer, door, service)
    service.guests.add(guest)
    try:
        await guest.run()
    finally:
        service.guests.discard(guest)


async def _end_slow_ones(service: Service) -> None:
    """A head that takes too long holds a place that others need."""
    while True:
        await asyncio.sleep(0.5)
        now = time.monotonic()
        for guest in list(service.guests):
            if guest.overdue(now):
                guest.end("limit-connect-seconds", "a request's head or a TLS handshake took too long")


def _read_line(fd: int) -> bytes:
    """One line; the rest of the descriptor is left alone (it ends when this process has to)."""
    read = bytearray()
    while not read.endswith(b"\n"):
        some = os.read(fd, 65536)
        if not some or len(read) > _TOLD:
            raise EOFError("no configuration")
        read += some
    return bytes(read)
