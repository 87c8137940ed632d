"""The sockets on which a filtered card's broker is reached: on the bridge's address, and bound to the bridge alone.

On all addresses of the host they would be open to its neighbours; and a port that we let go would fall to whatever
program of the host listens on all of them. (The host's own programs are kept out by our rules alone: the kernel takes
what they send to the bridge's address for the bridge's.)
"""

from __future__ import annotations

import errno
import socket
from contextlib import suppress

from vmsandbox.broker.start import Listeners
from vmsandbox.errors import HostError
from vmsandbox.render.network import DNS_PORT, PROXY_PORT, CardPlan

_BACKLOG = 256  # connections that wait for a broker that is not ready yet
_BIND_TO_DEVICE = 25  # SO_BINDTODEVICE, socket(7)


def listen_on(plan: CardPlan) -> Listeners:
    """All sockets of a session's broker.

    Raises:
        HostError: another program of the host listens on all addresses at one of the ports.
    """
    opened: list[socket.socket] = []

    def listen(port: int, kind: socket.SocketKind = socket.SOCK_STREAM) -> socket.socket:
        # No SO_REUSEADDR: while these are open, no other program of the host gets their ports on all addresses.
        sock = socket.socket(socket.AF_INET, kind | socket.SOCK_CLOEXEC)
        opened.append(sock)
        sock.setsockopt(socket.SOL_SOCKET, _BIND_TO_DEVICE, plan.bridge.encode())
        try:
            sock.bind((plan.host_address, port))
            if kind == socket.SOCK_STREAM:
                sock.listen(_BACKLOG)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            raise HostError(
                f"a program on this host listens on port {port} of all addresses, which the session's broker needs",
                details=f"`ss -lntup 'sport = :{port}'` shows it",
                resolution="let it listen on addresses of its own, or use --net proxy, which needs no port",
            ) from error
        return sock

    try:
        transparent = {port: listen(port) for port in plan.tcp_ports if port not in (DNS_PORT, PROXY_PORT)}
        return Listeners(listen(PROXY_PORT), transparent, listen(DNS_PORT, socket.SOCK_DGRAM), listen(DNS_PORT))
    except BaseException as error:
        for sock in opened:
            sock.close()
        if isinstance(error, OSError):
            raise HostError("the broker's sockets cannot be made", details=str(error)) from error
        raise


def sockets_of(listeners: Listeners) -> list[socket.socket]:
    """Every one of them."""
    named = (listeners.proxy, *listeners.transparent.values(), listeners.dns_tcp, listeners.dns_udp)
    return [sock for sock in named if sock is not None]


def silence(listeners: Listeners) -> None:
    """Refuse new connections, and keep the ports."""
    for sock in sockets_of(listeners):
        with suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)
