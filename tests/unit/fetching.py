"""A broker's content rules asked as the broker asks them, and index pages as the registries make them."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterable
from datetime import UTC, datetime

from vmsandbox.egress.content import Content
from vmsandbox.egress.values import BrokerConfig, Destination, EgressEvent, EgressPolicy, PackageRules

NOW = 1_790_000_000.0
SHORT = "application/vnd.npm.install-v1+json; q=1.0, application/json; q=0.8, */*"
PIP = "application/vnd.pypi.simple.v1+json, application/vnd.pypi.simple.v1+html; q=0.1, text/html; q=0.01"
Headers = list[tuple[str, str]]


def content(rules: PackageRules | None = None) -> Content:
    policy = EgressPolicy(packages=rules or PackageRules())
    return Content(BrokerConfig("s", policy, {}, (), "", ""), clock=lambda: NOW)


def get(
    checked: Content, url: str, body: bytes = b"", accept: str = "*/*", answer: Headers | None = None, status: int = 200
) -> list[EgressEvent]:
    """What the broker does for one GET that is let through."""
    host, _, path = url.partition("/")
    to = Destination(host, 443)
    headers = [("Accept", accept)]
    assert checked.outgoing(to, "GET", "/" + path, headers, b"").decision.allowed
    watch = checked.watch(to, "GET", "/" + path, headers)
    if watch is None:
        return []
    answer = [("Content-Length", str(len(body)))] if answer is None else answer
    assert watch.start(status, answer).allowed
    for at in range(0, len(body), 1000):
        watch.feed(body[at : at + 1000])
    return watch.end()


def refusal(checked: Content, url: str, accept: str = "*/*") -> str:
    host, _, path = url.partition("/")
    decision = checked.outgoing(Destination(host, 443), "GET", "/" + path, [("Accept", accept)], b"").decision
    assert decision.allowed or decision.rule == "packages"
    return "" if decision.allowed else decision.reason


def ago(days: float) -> str:
    return datetime.fromtimestamp(NOW - days * 86_400, UTC).isoformat().replace("+00:00", "Z")


FILE = b"PK wheel" * 999
SHA256 = hashlib.sha256(FILE).hexdigest()


def pypi_page(name: str, url: str, digest: str = SHA256, uploaded: str | None = None) -> bytes:
    file = {"filename": url.rpartition("/")[2], "url": url, "hashes": {"sha256": digest}, "size": 1}
    return json.dumps(
        {"meta": {"api-version": "1.1"}, "name": name, "files": [{**file, "upload-time": uploaded}]}
    ).encode()


def npm_page(name: str, versions: dict[str, str], body: bytes = FILE, sha1: bool = False) -> bytes:
    """versions: → time."""
    sri = "sha512-" + base64.b64encode(hashlib.sha512(body).digest()).decode()
    dist = {"shasum": hashlib.sha1(body).hexdigest(), **({} if sha1 else {"integrity": sri})}
    base = name.rpartition("/")[2]
    manifests = {
        one: {"dist": {**dist, "tarball": f"https://registry.npmjs.org/{name}/-/{base}-{one}.tgz"}} for one in versions
    }
    return json.dumps({"name": name, "versions": manifests, "time": {"created": ago(1), **versions}}).encode()


def only(events: Iterable[EgressEvent]) -> EgressEvent:
    [event] = events
    return event
