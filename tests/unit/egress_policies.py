"""Small policies and the questions that can be put to them, drawn so that they often meet."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from hypothesis import strategies as st

from vmsandbox.egress.compile import compile_policy
from vmsandbox.egress.decide import Rules
from vmsandbox.egress.values import Destination
from vmsandbox.policy.values import NetworkPolicy, NetworkRule

PATTERNS = ("a.org", "b.a.org", "*.a.org", "*.b.a.org", "*.org", "*", "192.0.2.1")
HOSTS = ("a.org", "b.a.org", "c.b.a.org", "x.a.org", "y.org", "z.net", "192.0.2.1", "192.0.2.2", "2001:db8::1")
PORTS = (80, 443, 8443)
METHODS = ("GET", "POST", "HEAD", "PATCH")
GLOBS = ("/", "/*", "/x", "/x/*", "/x/y", "/x*", "*/y", "/*/y", "/x/*/y", "*", "/x%2Fy")
PATHS = ("/", "/x", "/x/", "/x/y", "/xy", "/z/y", "/x/q/y", "/z", "/x%2fy", "/x%2Fq%2Fy", "/z?/x/y")

entries = st.builds(
    lambda pattern, port: pattern if port is None else f"{pattern}:{port}",
    st.sampled_from(PATTERNS),
    st.sampled_from([None, *PORTS]),
) | st.sampled_from(["@github", "@pypi"])


def some(values: tuple[object, ...], most: int = 2) -> st.SearchStrategy[tuple[object, ...]]:
    return st.lists(st.sampled_from(values), max_size=most, unique=True).map(tuple)


rules = st.builds(NetworkRule, st.sampled_from(PATTERNS), some(PORTS), some(METHODS), some(GLOBS))
networks = st.builds(
    NetworkPolicy,
    allowed_hosts=st.lists(entries, max_size=3).map(tuple),
    denied_hosts=st.lists(entries, max_size=2).map(tuple),
    rules=st.lists(rules, max_size=3).map(tuple),
)


def asked() -> Iterator[tuple[Destination, str, str]]:
    """Every question that the parts above can make."""
    for host, port, method, path in itertools.product(HOSTS, PORTS, METHODS, PATHS):
        yield Destination(host, port), method, path


def rules_of(network: NetworkPolicy, learn: bool = False) -> Rules:
    return Rules(compile_policy(network, learn=learn))
