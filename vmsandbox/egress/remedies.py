"""The YAML that a person adds to a policy to allow what was refused.

Without it each refusal sends a person to the manual, and from there to `*`. Each text is a whole policy file that loads
(`load_policy`); its lists are added to those that are there. Names come from a guest: they are quoted as JSON strings,
which YAML reads the same way, and only what was parsed gets here.
"""

from __future__ import annotations

import json
from urllib.parse import quote

from vmsandbox.egress.paths import SLASH, BadPathError, readings
from vmsandbox.egress.values import WEB_PORTS, Destination

_LONGEST_PATH = 512
_PLAIN = "/:@!$&'()+,;=~"


def allow_host(to: Destination) -> str:
    """Allows a host, on the ports of the web if it is one of them."""
    return _network({"allowed_hosts": [_bare(to.host) if to.port in WEB_PORTS else str(to)]})


def allow_port(pattern: str, port: int) -> str:
    """Allows one port more of a pattern that is allowed on others."""
    return _network({"allowed_hosts": [str(Destination(pattern, port))]})


def allow_address(to: Destination, address: str) -> str:
    """Allows a host at an address that is not dialled otherwise."""
    return _network({"rules": [{"host": _bare(to.host), "ports": [to.port], "addresses": [address]}]})


def allow_request(pattern: str, port: int, method: str, path: str) -> str:
    """Allows one method and path; empty if the path cannot be written as a glob that means it alone."""
    rule: dict[str, object] = {"host": _bare(pattern), "ports": [port], "methods": [method]}
    try:
        found = readings(path)
    except BadPathError:
        return ""
    if any("*" in one or len(one) > _LONGEST_PATH for one in found):
        return ""
    # A glob is decoded once when it is read.
    rule["paths"] = [SLASH.join(quote(part, safe=_PLAIN) for part in one.split(SLASH)) for one in found]
    return _network({"rules": [rule]})


def _network(section: dict[str, object]) -> str:
    return json.dumps({"sandbox": {"network": section}})


def _bare(host: str) -> str:
    return f"[{host}]" if ":" in host else host
