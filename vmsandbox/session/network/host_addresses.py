"""This host's own addresses: what the broker never dials, whatever name leads to them."""

from __future__ import annotations

import ipaddress
import re
from contextlib import suppress
from pathlib import Path

_LOCAL = re.compile(r"\|-- (\S+)\n\s+/32 host LOCAL")


def own_addresses(root: Path = Path("/")) -> tuple[str, ...]:
    """All addresses of this host's interfaces, as `ipaddress` writes them, by the kernel's tables in /proc/net."""
    found = set()
    with suppress(OSError):
        found |= set(_LOCAL.findall((root / "proc/net/fib_trie").read_text()))
    with suppress(OSError, ValueError):
        for line in (root / "proc/net/if_inet6").read_text().splitlines():
            found.add(str(ipaddress.IPv6Address(bytes.fromhex(line.split()[0]))))
    return tuple(sorted(found))
