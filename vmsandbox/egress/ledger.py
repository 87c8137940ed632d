"""Writes down what was fetched from package indexes, and remembers what they promised about it.

Without it nobody could say afterwards which packages ran in the guest, and a mirror that hands out something else than
its index says would go unnoticed. Digests are taken while the bytes pass; nothing is held back.
"""

from __future__ import annotations

import bz2
import hashlib
import lzma
import zlib
from collections.abc import Callable
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urljoin, urlsplit

from vmsandbox.egress.indexes import LARGEST, Promise, crate_place, file_place, read_index, read_stanzas
from vmsandbox.egress.packages import Fetch, Part, by_age, by_name, plain_path, recognise
from vmsandbox.egress.values import Decision, Destination, EgressEvent, EgressKind, PackageRules

ALLOWED = Decision(True, "packages", "")
_MOST_PROMISES = 100_000  # of each kind; Debian's main has 63,000 packages
_LARGEST_DEBIAN = 512 << 20  # bytes of Packages, unpacked; read as it passes
_LONGEST_STANZA = 256 << 10
_STEP = 1 << 20
_REDIRECTS = (301, 302, 303, 307, 308)
_PACKERS: tuple[tuple[bytes, Callable[[], Any]], ...] = (
    (b"\x1f\x8b", lambda: zlib.decompressobj(31)),
    (b"\xfd7zXZ\x00", lambda: lzma.LZMADecompressor(memlimit=96 << 20)),
    (b"BZh", bz2.BZ2Decompressor),
)


class Ledger:
    """One session's packages."""

    def __init__(self, rules: PackageRules, clock: Callable[[], float]) -> None:
        self.rules = rules
        self.clock = clock
        self._promises: dict[str, Promise] = {}
        self._debian: dict[str, bytes] = {}

    def fetch(self, to: Destination, path: str, accept: str) -> Fetch | None:
        """What is fetched: by the shape of the path, or because an index said that the file is there."""
        if (fetch := recognise(to.host, path, accept)) is not None:
            return fetch
        promise = self._promises.get(file_place(to.host, path))
        return None if promise is None else promise.fetch

    def promise(self, fetch: Fetch, host: str, path: str) -> Promise | None:
        """What an index said about this file, or None."""
        place = file_place(host, path)
        if fetch.ecosystem == "debian":
            digest = self._debian.get(place)
            return None if digest is None else Promise(fetch, "sha256", digest.hex(), None, host)
        found = self._promises.get(place)
        if found is None and fetch.ecosystem == "crates":
            found = self._promises.get(crate_place(fetch.name, fetch.version))
        if found is None and fetch.part is Part.ABOUT:
            found = self._promises.get(place.removesuffix(".metadata"))
        return found

    def decide(self, fetch: Fetch, to: Destination, path: str) -> Decision | None:
        """A refusal for the name or the age of a package, or None."""
        promise = self.promise(fetch, to.host, path)
        uploaded = None if promise is None else promise.uploaded
        return by_name(self.rules, fetch) or by_age(self.rules, fetch, uploaded, self.clock())

    def remember(self, place: str, promise: Promise) -> None:
        _put(self._promises, place, promise)

    def remember_debian(self, place: str, digest: bytes) -> None:
        _put(self._debian, place, digest)


class ResponseWatch:
    """Follows the answer to one request of a package manager."""

    def __init__(self, ledger: Ledger, fetch: Fetch, to: Destination, path: str) -> None:
        self._ledger = ledger
        self._fetch = fetch
        self._to = to
        self._path = path
        self._promise = ledger.promise(fetch, to.host, path) if fetch.part is Part.FILE else None
        self._reader: _Digests | _Page | _Stanzas | None = None
        self._status = 0
        self._length: int | None = None
        self._encoding = ""
        self._received = 0

    def start(self, status: int, headers: list[tuple[str, str]]) -> Decision:
        """The answer's head. A refusal: its body must not reach the guest.

        Where no index said when a file was uploaded, its Last-Modified header is taken for that; without one it is
        let through, and the ledger says that its age is not known.
        """
        untrusted = {name.lower(): value for name, value in headers}
        self._status = status
        self._encoding = untrusted.get("content-encoding", "").strip().lower().replace("identity", "")
        length = untrusted.get("content-length", "")
        self._length = int(length) if length.isdecimal() and len(length) < 16 else None
        if status in _REDIRECTS and self._promise is not None:
            self._follow(untrusted.get("location", ""), self._promise)
        if status != 200:
            return ALLOWED
        if self._fetch.part is Part.FILE:
            if self._promise is None or self._promise.uploaded is None:
                uploaded = _http_date(untrusted.get("last-modified", ""))
                refusal = by_age(self._ledger.rules, self._fetch, uploaded, self._ledger.clock())
                if refusal is not None:
                    self._status = 0  # nothing was fetched
                    return refusal
            self._reader = _Digests(self._promise.algorithm if self._promise else "")
        elif self._fetch.part is Part.INDEX:
            debian = self._fetch.ecosystem == "debian"
            self._reader = self._stanzas() if debian else _Page(self._encoding)
        return ALLOWED

    def feed(self, chunk: bytes) -> None:
        """The next bytes of the body, as they came."""
        self._received += len(chunk)
        if self._reader is not None:
            self._reader.feed(chunk)

    def end(self, whole: bool = True) -> list[EgressEvent]:
        """The answer is over. whole: as far as the connection tells; a length that does not fit counts as not."""
        complete = whole and self._length in (None, self._received)
        if isinstance(self._reader, _Page) and complete:
            content = self._reader.content()
            for place, promise in read_index(self._fetch, self._to.host, self._path, content):
                self._ledger.remember(place, promise)
        if self._fetch.part is not Part.FILE or self._status not in (200, 206):
            return []
        return self._events(complete)

    def _events(self, complete: bool) -> list[EgressEvent]:
        more = {
            "ecosystem": self._fetch.ecosystem,
            "name": self._fetch.name,
            "version": self._fetch.version,
            "index": self._promise.source if self._promise else self._to.host,
        }
        if self._promise and self._promise.uploaded is not None:
            more["uploaded"] = f"{self._promise.uploaded:.0f}"
        if not isinstance(self._reader, _Digests) or not complete:
            more["partial"] = "yes"  # a range, or it broke off: there is nothing to take a digest of
            return [self._event(EgressKind.PACKAGE, more)]
        digests = self._reader.digests()
        more["digest"] = "sha256:" + digests["sha256"]
        if self._encoding:
            more["encoded"] = self._encoding
            return [self._event(EgressKind.PACKAGE, more)]
        if self._promise is None or not self._promise.digest:
            return [self._event(EgressKind.PACKAGE, more)]
        promised = f"{self._promise.algorithm}:{self._promise.digest}"
        more["promised"] = promised
        events = [self._event(EgressKind.PACKAGE, more)]
        if (got := digests[self._promise.algorithm]) != self._promise.digest:
            what = f"{self._fetch} is not what its index promised"
            alert = {**more, "what": what, "where": "response", "got": f"{self._promise.algorithm}:{got}"}
            events.append(self._event(EgressKind.ALERT, alert, what))
        return events

    def _event(self, kind: EgressKind, more: dict[str, str], reason: str = "") -> EgressEvent:
        path = self._path.partition("?")[0]  # a query may be a signature
        return EgressEvent(
            kind, self._ledger.clock(), host=self._to.host, port=self._to.port, method="GET", path=path,
            status=self._status, rule="packages" if reason else "", reason=reason, received=self._received, more=more,
        )  # fmt: skip

    def _follow(self, untrusted_location: str, promise: Promise) -> None:
        try:
            parts = urlsplit(urljoin(f"https://{self._to.host}{self._path}", untrusted_location))
            host = parts.hostname
        except ValueError:
            return
        if host:
            self._ledger.remember(file_place(host, parts.path), promise)

    def _stanzas(self) -> _Stanzas:
        root, dists, _ = plain_path(self._path).rpartition("/dists/")
        if not dists:  # a flat repository: beside the index
            root = plain_path(self._path).rpartition("/")[0]
        return _Stanzas(self._ledger, self._to.host + root)


class _Digests:
    def __init__(self, algorithm: str) -> None:
        self._hashes = {name: hashlib.new(name, usedforsecurity=False) for name in {"sha256", algorithm or "sha256"}}

    def feed(self, chunk: bytes) -> None:
        for one in self._hashes.values():
            one.update(chunk)

    def digests(self) -> dict[str, str]:
        return {name: one.hexdigest() for name, one in self._hashes.items()}


class _Page:
    """An index page, unpacked, as far as it is not too large."""

    def __init__(self, encoding: str) -> None:
        self._unpacker = zlib.decompressobj(47) if encoding in ("gzip", "x-gzip", "deflate") else None
        self._readable = not encoding or self._unpacker is not None
        self._content = bytearray()

    def feed(self, chunk: bytes) -> None:
        if not self._readable:
            return
        try:
            room = LARGEST + 1 - len(self._content)
            self._content += chunk if self._unpacker is None else self._unpacker.decompress(chunk, room)
        except zlib.error:
            self._readable = False
        if len(self._content) > LARGEST:
            self._readable = False
        if not self._readable:
            self._content.clear()

    def content(self) -> bytes:
        return bytes(self._content)


class _Stanzas:
    """Debian's Packages, unpacked and read piece by piece: it has 50 MB."""

    def __init__(self, ledger: Ledger, root: str) -> None:
        self._ledger = ledger
        self._root = root
        self._unpacker: Any = None
        self._begun = self._over = False
        self._seen = 0
        self._rest = b""

    def feed(self, chunk: bytes) -> None:
        if self._over or not chunk:
            return
        if not self._begun:
            self._begun = True
            self._unpacker = next((make() for magic, make in _PACKERS if chunk.startswith(magic)), None)
        try:
            if self._unpacker is None:
                self._read(chunk)
            elif isinstance(self._unpacker, bz2.BZ2Decompressor | lzma.LZMADecompressor):
                self._unpack(self._unpacker, chunk)
            else:
                while chunk and not self._over:
                    self._read(self._unpacker.decompress(chunk, _STEP))
                    chunk = self._unpacker.unconsumed_tail
        except (OSError, EOFError, lzma.LZMAError, zlib.error):
            self._over = True

    def _unpack(self, unpacker: bz2.BZ2Decompressor | lzma.LZMADecompressor, chunk: bytes) -> None:
        self._read(unpacker.decompress(chunk, _STEP))
        while not (self._over or unpacker.eof or unpacker.needs_input):
            self._read(unpacker.decompress(b"", _STEP))

    def _read(self, text: bytes) -> None:
        self._seen += len(text)
        whole, _, self._rest = (self._rest + text).rpartition(b"\n\n")
        self._over = self._seen > _LARGEST_DEBIAN or len(self._rest) > _LONGEST_STANZA
        for place, digest in read_stanzas(self._root, whole):
            self._ledger.remember_debian(place, digest)


def _put(table: dict[str, Any], key: str, value: Any) -> None:
    table.pop(key, None)  # so that it counts as new
    table[key] = value
    if len(table) > _MOST_PROMISES:
        del table[next(iter(table))]


def _http_date(untrusted: str) -> float | None:
    try:
        return parsedate_to_datetime(untrusted[:64]).timestamp()
    except (ValueError, TypeError, IndexError, OverflowError):
        return None
