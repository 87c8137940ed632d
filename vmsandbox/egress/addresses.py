"""Which IP addresses are never dialled for a guest, whatever name led to them.

Without it an allowed name that somebody else's DNS server points at 127.0.0.1, at the cloud's metadata service or at
the router would be a way into the host and its network. Tables of our own: `ipaddress.is_global` says different things
in different releases of Python, and nothing about addresses inside addresses.

Sources: IANA's special-purpose address registries for IPv4 and IPv6 (RFC 6890), RFC 6052 and 8215 (NAT64), 7526 (6to4).
"""

from __future__ import annotations

import ipaddress
from collections.abc import Collection

from vmsandbox.errors import VmsandboxError

MAX_ADDRESS = 45

# The most specific comes first. Cloud metadata services first of all: their refusal should be called by its name.
_V4 = tuple(
    (ipaddress.IPv4Network(network), reason)
    for network, reason in (
        ("169.254.169.254/32", "a metadata service"),
        ("169.254.169.253/32", "a metadata service"),
        ("169.254.169.123/32", "a metadata service"),
        ("169.254.170.2/32", "a metadata service"),
        ("169.254.170.23/32", "a metadata service"),
        ("100.100.100.200/32", "a metadata service"),
        ("168.63.129.16/32", "a metadata service"),
        ("192.0.0.192/32", "a metadata service"),
        ("0.0.0.0/8", "an unspecified address"),
        ("10.0.0.0/8", "a private address"),
        ("100.64.0.0/10", "an address of a carrier's NAT"),
        ("127.0.0.0/8", "a loopback address"),
        ("169.254.0.0/16", "a link-local address"),
        ("172.16.0.0/12", "a private address"),
        ("192.0.0.0/24", "a reserved address"),
        ("192.0.2.0/24", "a documentation address"),
        ("192.88.99.0/24", "a reserved address"),
        ("192.168.0.0/16", "a private address"),
        ("198.18.0.0/15", "a benchmarking address"),
        ("198.51.100.0/24", "a documentation address"),
        ("203.0.113.0/24", "a documentation address"),
        ("224.0.0.0/4", "a multicast address"),
        ("255.255.255.255/32", "a broadcast address"),
        ("240.0.0.0/4", "a reserved address"),
    )
)
_V6 = tuple(
    (ipaddress.IPv6Network(network), reason)
    for network, reason in (
        ("fd00:ec2::254/128", "a metadata service"),
        ("fd00:ec2::253/128", "a metadata service"),
        ("fd00:ec2::23/128", "a metadata service"),
        ("fd20:ce::254/128", "a metadata service"),
        ("fd00:42::42/128", "a metadata service"),
        ("::/128", "an unspecified address"),
        ("::1/128", "a loopback address"),
        ("::/96", "a reserved address"),
        ("64:ff9b:1::/48", "a private address"),
        ("100::/64", "a reserved address"),
        ("2001::/32", "a Teredo address"),
        ("2001::/23", "a reserved address"),
        ("2001:db8::/32", "a documentation address"),
        ("2002::/16", "a 6to4 address"),
        ("3fff::/20", "a documentation address"),
        ("5f00::/16", "a reserved address"),
        ("fc00::/7", "a private address"),
        ("fe80::/10", "a link-local address"),
        ("fec0::/10", "a private address"),
        ("ff00::/8", "a multicast address"),
    )
)
_GLOBAL_V6 = ipaddress.IPv6Network("2000::/3")
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_TRANSLATED = ipaddress.IPv6Network("::ffff:0:0:0/96")  # RFC 2765 2.1
_ISATAP = (0x00005EFE, 0x02005EFE)  # RFC 5214 6.1: the upper half of the interface's identifier


class BadHostError(VmsandboxError):
    """Not a host, port, address or pattern of them that can be read in exactly one way."""


def parse_address(text: str) -> str:
    """One IP address without brackets or port, canonical; IPv4-mapped IPv6 becomes the IPv4 that is meant."""
    if len(text) > MAX_ADDRESS or not text.isascii() or "%" in text:
        raise BadHostError(f"not an IP address: {text[:100]!a}")
    try:
        return str(unmapped(ipaddress.ip_address(text)))
    except ValueError:
        raise BadHostError(f"not an IP address: {text[:100]!a}") from None


def refused_address(address: str, own_addresses: Collection[str]) -> str | None:
    """Why an address may not be dialled ("a private address"), or None where nothing is against it.

    Args:
        own_addresses: the host's, in any spelling; what is none is ignored.
    """
    try:
        value = ipaddress.ip_address(parse_address(address))
    except BadHostError:
        return "no address"
    own = {one for one in map(_canonical, own_addresses) if one}
    reason = _refused(value)
    if reason:
        return reason
    embedded = [value, *([] if value.version == 4 else _embedded(value))]
    if any(str(one) in own for one in embedded):
        return "an address of this host"
    for one in embedded[1:]:
        if inner := _refused(one):
            return f"{inner} inside an IPv6 address"
    if isinstance(value, ipaddress.IPv6Address) and value not in _GLOBAL_V6 and value not in _NAT64:
        return "a reserved address"
    return None


def unmapped(
    address: ipaddress.IPv4Address | ipaddress.IPv6Address,
) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """The IPv4 address that an IPv4-mapped IPv6 address means, else the same; ValueError for a zone."""
    if isinstance(address, ipaddress.IPv6Address):
        if address.scope_id is not None:
            raise ValueError("zone")
        return address.ipv4_mapped or address
    return address


def _refused(value: ipaddress.IPv4Address | ipaddress.IPv6Address) -> str | None:
    if isinstance(value, ipaddress.IPv4Address):
        return next((reason for network, reason in _V4 if value in network), None)
    return next((reason for network, reason in _V6 if value in network), None)


def _embedded(value: ipaddress.IPv6Address) -> list[ipaddress.IPv4Address]:
    """The IPv4 addresses that a packet to this IPv6 address may end at."""
    number = int(value)
    found = []
    if value in _NAT64 or value in _TRANSLATED or (number >> 32) & 0xFFFFFFFF in _ISATAP:
        found.append(ipaddress.IPv4Address(number & 0xFFFFFFFF))
    return found


def _canonical(address: str) -> str:
    try:
        return parse_address(address.partition("%")[0])
    except BadHostError:
        return ""
