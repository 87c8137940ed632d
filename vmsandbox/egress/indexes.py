"""What package indexes promise about their files: digest and time of upload.

Everything here was sent by a server that may be anyone's: sizes are bounded, and what is not of the expected form is
left out. Sources: PEP 503, 691 and 700; npm's `package-metadata`; cargo's index format; Debian's repository format.
"""

from __future__ import annotations

import html
import json
import re
from base64 import b64decode
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from typing import Any, NamedTuple
from urllib.parse import urljoin, urlsplit

from vmsandbox.egress.packages import Fetch, Part, canonical, plain_path, pypi_file

LARGEST = 24 << 20  # bytes of an index page, unpacked: a parsed one is several times that
_MOST_FILES = 50_000
_LONGEST = 500  # characters of a version or a time
_HREF = re.compile(r"""<a\s[^>]{0,4000}?\bhref\s*=\s*["']([^"']{1,4000})["']""", re.IGNORECASE)
_HEX = re.compile(r"[0-9a-f]{32,128}")
_SIZES = {"sha256": 64, "sha512": 128, "sha1": 40, "sha384": 96}
_STANZA = re.compile(rb"^(Filename|SHA256): ([^\n]{1,1000})$", re.MULTILINE)


class Promise(NamedTuple):
    """What an index says about one file. digest: hex, empty if it says none. uploaded: seconds since the epoch."""

    fetch: Fetch
    algorithm: str
    digest: str
    uploaded: float | None
    source: str  # host of the index


class Listed(NamedTuple):
    """A file on an index page. place: `file_place`, or of crates, whose pages have no addresses, `crate_place`."""

    place: str
    promise: Promise


def file_place(host: str, path: str) -> str:
    """What a file is known by."""
    return host + plain_path(path)


def crate_place(name: str, version: str) -> str:
    return f"crates:{name}:{version}"


def read_index(fetch: Fetch, host: str, path: str, content: bytes) -> Iterator[Listed]:
    """What a page of pypi, npm or crates promises; nothing if it is not understood."""
    readers = {"pypi": _pypi, "npm": _npm, "crates": _crates}
    here = f"https://{host}{path}"
    for number, one in enumerate(readers[fetch.ecosystem](fetch, here, content)):
        if number >= _MOST_FILES:
            return
        yield one


def read_stanzas(root: str, untrusted: bytes) -> Iterator[tuple[str, bytes]]:
    """(place, SHA-256) of each package in whole stanzas of Debian's Packages file. root: place of the archive."""
    for stanza in untrusted.split(b"\n\n"):
        found = dict(_STANZA.findall(stanza))
        digest = found.get(b"SHA256", b"").decode("ascii", "replace").strip()
        if b"Filename" in found and _is_hex(digest, 64):
            path = found[b"Filename"].decode("utf-8", "replace").strip()
            yield root + plain_path(path), bytes.fromhex(digest)


def timestamp(untrusted: Any) -> float | None:
    """Seconds since the epoch of an ISO 8601 time, or None."""
    if not isinstance(untrusted, str) or len(untrusted) > 64:
        return None
    try:
        parsed = datetime.fromisoformat(untrusted)
    except ValueError:
        return None
    return (parsed if parsed.tzinfo else parsed.replace(tzinfo=UTC)).timestamp()


def _pypi(fetch: Fetch, here: str, content: bytes) -> Iterator[Listed]:
    host = urlsplit(here).netloc
    for address, hashes, uploaded in _pypi_json(content) if content.lstrip()[:1] == b"{" else _pypi_html(content):
        name = address.partition("#")[0].partition("?")[0].rpartition("/")[2]
        file = pypi_file(name, source_too=True) or Fetch("pypi", Part.FILE, fetch.name)
        fragment = address.partition("#")[2]
        if not hashes and fragment.startswith("sha256="):
            hashes = {"sha256": fragment[7:]}
        digest = str(hashes.get("sha256", "")).lower()
        promise = Promise(
            file,
            "sha256",
            digest if _is_hex(digest, 64) else "",
            timestamp(uploaded),
            host,
        )
        yield from _listed(here, address, promise)


def _pypi_json(content: bytes) -> Iterator[tuple[str, dict[str, Any], Any]]:
    """PEP 691's page, or PyPI's own JSON of a project, which poetry reads."""
    page = _json(content)
    files = [*_list(page.get("files")), *_list(page.get("urls"))]
    for of_version in _dict(page.get("releases")).values():
        files += _list(of_version)
    for one in map(_dict, files):
        if isinstance(address := one.get("url"), str):
            hashes = _dict(one.get("hashes")) or _dict(one.get("digests"))
            yield address, hashes, one.get("upload-time") or one.get("upload_time_iso_8601")


def _pypi_html(content: bytes) -> Iterator[tuple[str, dict[str, Any], Any]]:
    for match in _HREF.finditer(content.decode("utf-8", "replace")):
        yield html.unescape(match[1]), {}, None


def _npm(fetch: Fetch, here: str, content: bytes) -> Iterator[Listed]:
    page = _json(content)
    times = _dict(page.get("time"))
    for version, manifest in _dict(page.get("versions")).items():
        dist = _dict(_dict(manifest).get("dist"))
        algorithm, digest = _integrity(dist.get("integrity"))
        shasum = str(dist.get("shasum", "")).lower()
        if not digest and _is_hex(shasum, 40):
            algorithm, digest = "sha1", shasum
        if isinstance(address := dist.get("tarball"), str):
            file = Fetch("npm", Part.FILE, fetch.name, version[:_LONGEST])
            promise = Promise(file, algorithm, digest, timestamp(times.get(version)), urlsplit(here).netloc)
            yield from _listed(here, address, promise)


def _crates(fetch: Fetch, here: str, content: bytes) -> Iterator[Listed]:
    host = urlsplit(here).netloc
    for line in content.splitlines():
        one = _json(line)
        name, version, digest = str(one.get("name")), str(one.get("vers")), str(one.get("cksum", "")).lower()
        if canonical("crates", name) == fetch.name and len(version) < _LONGEST:
            file = Fetch("crates", Part.FILE, fetch.name, version)
            promise = Promise(
                file, "sha256", digest if _is_hex(digest, 64) else "", timestamp(one.get("pubtime")), host
            )
            yield Listed(crate_place(fetch.name, version), promise)


def _listed(here: str, address: str, promise: Promise) -> Iterator[Listed]:
    try:
        parts = urlsplit(address if "://" in address else urljoin(here, address))
        host = parts.hostname
    except ValueError:
        return
    if host and parts.scheme in ("http", "https"):
        yield Listed(file_place(host, parts.path), promise)


def _integrity(untrusted: Any) -> tuple[str, str]:
    """The strongest digest of Subresource Integrity's list, in hex."""
    found: dict[str, str] = {}
    for one in str(untrusted or "").split()[:8]:
        algorithm, _, encoded = one.partition("-")
        try:
            digest = b64decode(encoded.partition("?")[0], validate=True).hex()
        except ValueError:
            continue
        if _SIZES.get(algorithm) == len(digest):
            found[algorithm] = digest
    return next(((name, found[name]) for name in ("sha512", "sha384", "sha256", "sha1") if name in found), ("", ""))


def _json(content: bytes) -> dict[str, Any]:
    try:
        return _dict(json.loads(content))
    except (ValueError, RecursionError):
        return {}


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _list(value: Any) -> Iterable[Any]:
    return value if isinstance(value, list) else []


def _is_hex(text: str, size: int) -> bool:
    return len(text) == size and _HEX.fullmatch(text) is not None
