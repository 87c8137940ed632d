"""Finds a name's addresses: by the host's own means, or by the DNS servers that the policy names.

Each connection asks anew, and what it gets is checked and dialled: there is no second look-up that could say something
else.
"""

from __future__ import annotations

import asyncio
import secrets
import socket
import struct
from collections.abc import Sequence
from concurrent.futures import Executor

from vmsandbox.broker.dnswire import AAAA, NOERROR, NXDOMAIN, A, Answer, BadMessage, parse_answer, query
from vmsandbox.egress.hosts import parse_destination

_TRY_SECONDS = 3.0
_TRIES = 2
_ADDRESSES = 8  # of one name that are tried at most
_DNS_PORT = 53


class ResolveError(Exception):
    """A name has no address, or nobody could be asked."""


class Resolver:
    """Resolves names.

    Args:
        servers: as in the policy, `address` or `address:port`; empty: the host's own configuration.
        threads: where the host's resolver waits.
    """

    def __init__(self, servers: Sequence[str], threads: Executor) -> None:
        self._servers = [parse_destination(_bracketed(one), _DNS_PORT) for one in servers]
        self._threads = threads

    async def addresses(self, name: str) -> list[str]:
        """Addresses of a canonical name, in the order they are to be tried; raises ResolveError."""
        found = await (self._ask_servers(name) if self._servers else self._ask_host(name))
        if not found:
            raise ResolveError(f"{name} has no address")
        return list(dict.fromkeys(found))[:_ADDRESSES]

    async def _ask_host(self, name: str) -> list[str]:
        def look_up() -> list[str]:
            found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM, flags=socket.AI_ADDRCONFIG)
            return [str(entry[4][0]).partition("%")[0] for entry in found]

        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, look_up)
        except (OSError, UnicodeError) as error:
            raise ResolveError(f"{name} could not be resolved: {error}") from None

    async def _ask_servers(self, name: str) -> list[str]:
        last = "no answer"
        for _ in range(_TRIES):
            for host, port in self._servers:
                try:
                    both = await asyncio.gather(*(self._ask(host, port, name, kind) for kind in (A, AAAA)))
                except (TimeoutError, OSError, BadMessage, asyncio.IncompleteReadError) as error:
                    last = str(error) or type(error).__name__
                    continue
                if found := [address for answer in both for address in answer.addresses]:
                    return found
                if all(answer.status in (NOERROR, NXDOMAIN) for answer in both):
                    return []
                last = f"the DNS server answers with status {both[0].status}"
        raise ResolveError(f"{name} could not be resolved: {last}")

    async def _ask(self, host: str, port: int, name: str, kind: int) -> Answer:
        number = secrets.randbelow(1 << 16)
        asked = query(number, name, kind)
        answer = await asyncio.wait_for(_over_udp(host, port, asked, number, name, kind), _TRY_SECONDS)
        if answer.truncated:
            answer = await asyncio.wait_for(_over_tcp(host, port, asked, number, name, kind), _TRY_SECONDS)
        return answer


async def _over_udp(host: str, port: int, asked: bytes, number: int, name: str, kind: int) -> Answer:
    loop = asyncio.get_running_loop()
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC) as sock:
        sock.connect((host, port))  # nobody else's datagrams are taken
        await loop.sock_sendall(sock, asked)
        while True:
            untrusted = await loop.sock_recv(sock, 65535)
            try:
                return parse_answer(untrusted, number, name, kind)
            except (BadMessage, struct.error):
                continue  # forged or late: the right one may still come


async def _over_tcp(host: str, port: int, asked: bytes, number: int, name: str, kind: int) -> Answer:
    reader, writer = await asyncio.open_connection(host, port)
    try:
        writer.write(struct.pack("!H", len(asked)) + asked)
        (length,) = struct.unpack("!H", await reader.readexactly(2))
        return parse_answer(await reader.readexactly(length), number, name, kind)
    finally:
        writer.close()


def _bracketed(server: str) -> str:
    return f"[{server}]" if server.count(":") > 1 and not server.startswith("[") else server
