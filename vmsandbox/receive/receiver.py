"""Turns what a guest sends back into blobs and the entries of its tree. Runs in a process with nothing to lose.

What counts of a file is what arrived: its digest and size are worked out here, never claimed by the guest.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections import deque
from typing import BinaryIO

from vmsandbox.receive.listing import Listed, Records, parse_record, read_hello, target_of
from vmsandbox.receive.protocol import (
    DATA,
    ENOUGH,
    LAST,
    LISTED,
    LISTING,
    PROGRESS,
    REQUEST,
    UNREADABLE,
    ProtocolError,
    ReturnLimits,
    frame,
    read_frame,
)  # fmt: skip
from vmsandbox.review.manifest import Item

_CREDIT = 48 << 10  # bytes of requests that may be unanswered: what any pipe on the way holds, so that nobody blocks
_BLOCK = 4096
_INCOMING = "incoming"
_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_FORMS = {stat.S_IFREG: "file", stat.S_IFDIR: "dir", stat.S_IFLNK: "symlink"}


class HostFailed(Exception):
    """The host's fault: a full disk, for example."""


class Blobs:
    """Writes files into the quarantine, each named by the digest of what arrived."""

    def __init__(self, folder: int, limits: ReturnLimits) -> None:
        self._folder = folder
        self._limits = limits
        self._known: set[str] = set()
        self._fd = -1
        self._sha = hashlib.sha256()
        self._size = 0
        self.total = 0  # bytes that arrived, each file rounded up to blocks: empty ones are not for nothing

    def add(self, untrusted: bytes) -> None:
        """More of the current file. Raises ProtocolError over a limit, HostFailed if it cannot be written."""
        self._size += len(untrusted)
        if self._size > self._limits.file_bytes:
            raise ProtocolError(f"a file is larger than {self._limits.file_bytes} bytes")
        if self.total + self._size > self._limits.total_bytes:
            raise over_total(self._limits)
        self._sha.update(untrusted)
        try:
            if self._fd < 0:
                self._fd = os.open(_INCOMING, _NEW_FILE, 0o400, dir_fd=self._folder)
            view = memoryview(untrusted)
            while view:
                view = view[os.write(self._fd, view) :]
        except OSError as error:
            raise HostFailed(f"the quarantine cannot be written: {error.strerror}") from None

    def finish(self) -> tuple[str, int]:
        """The current file is whole: (its SHA-256, its size)."""
        digest, size = self._sha.hexdigest(), self._size
        if digest in self._known:
            self.discard()
        else:
            if self._fd < 0:
                self.add(b"")
            os.rename(_INCOMING, digest, src_dir_fd=self._folder, dst_dir_fd=self._folder)
            self._known.add(digest)
        self.total += blocks(size)
        self._reset()
        return digest, size

    def discard(self) -> None:
        """Forget the current file."""
        if self._fd >= 0:
            os.unlink(_INCOMING, dir_fd=self._folder)
        self._reset()

    def _reset(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
        self._fd, self._sha, self._size = -1, hashlib.sha256(), 0


class Receiver:
    """One return."""

    def __init__(
        self, guest: BinaryIO, parent: BinaryIO, blobs: Blobs, pushed: dict[str, Item], baseline: dict[bytes, str],
        limits: ReturnLimits,
    ) -> None:  # fmt: skip
        self._guest, self._parent, self._blobs = guest, parent, blobs
        self._pushed, self._baseline, self._limits = pushed, baseline, limits
        self._records = Records(limits)
        self._link: Listed | None = None  # a symlink whose target comes next
        self._wanted: deque[Listed] = deque()
        self._asked: deque[Listed] = deque()
        self._unanswered = 0  # bytes of requests
        self._promised = 0  # bytes of all files that were asked for, by what the guest says
        self.items: dict[str, Item] = {}
        self.held: list[str] = []  # folders that could not be looked into

    def run(self) -> None:
        """Read the whole return. Raises ProtocolError or HostFailed."""
        read_hello(self._guest)
        listing = True
        while listing or self._asked:
            allowed = (LISTING + LISTED if listing else b"") + (DATA + LAST + UNREADABLE if self._asked else b"")
            kind, data = read_frame(self._guest, allowed)
            if not data and kind in (LISTING, DATA):
                raise ProtocolError("a frame with nothing in it")  # could go on for ever
            if kind == LISTING:
                for record in self._records.feed(data):
                    self._record(record)
            elif kind == LISTED:
                self._records.end()
                if self._link is not None:
                    raise ProtocolError("the listing ends before a symlink's target")
                listing = False
            elif kind == DATA:
                self._blobs.add(data)
            else:
                self._answered(kind, data)
            self._ask()
        self._parent.write(frame(ENOUGH))
        self._parent.flush()
        self._keep_held()

    def _record(self, untrusted: bytes) -> None:
        if self._link is not None:
            self._add(self._link.path, Item("symlink", 0, target=target_of(untrusted)))
            self._link = None
            return
        path = self._baseline.get(untrusted)
        if path is not None:
            self._add(path, self._pushed[path])
            return
        entry = parse_record(untrusted, self._limits.depth)
        kind = _FORMS.get(entry.form, "other")
        if entry.form == 0:
            self._hold(entry.path)
        elif kind == "symlink":
            self._link = entry
        elif kind == "file":
            self._add(entry.path, Item("file", self._mode(entry), entry.size, None))
            self._want(entry)
        elif kind == "dir":
            self._add(entry.path, Item("dir", self._mode(entry)))
        else:
            self._add(entry.path, Item("other", entry.mode))

    def _add(self, path: str, item: Item) -> None:
        if path in self.items:
            raise ProtocolError("a path is there twice", path)
        self.items[path] = item
        if len(self.items) > self._limits.entries:
            raise ProtocolError(f"more than {self._limits.entries} entries")

    def _hold(self, path: str) -> None:
        if path not in self.items or self.items[path].kind != "dir" or len(self.held) >= self._limits.entries:
            raise ProtocolError("something that is no folder could not be looked into", path)
        self.held.append(path)

    def _mode(self, entry: Listed) -> int:
        """Of the guest's modes only "may be executed" counts; what was pushed keeps the rest of its own.

        So 0600 stays 0600 however the guest's tools write files, and no file becomes writable for others. Something
        new gets no more than 0644 or 0755. Setuid, setgid and sticky are gone since `parse_record`.
        """
        pushed = self._pushed.get(entry.path)
        executable = bool(entry.mode & 0o100)
        if entry.form == stat.S_IFDIR:
            return pushed.mode if pushed is not None and pushed.kind == "dir" else entry.mode & 0o755 | 0o700
        if pushed is None or pushed.kind != "file":
            return entry.mode & (0o755 if executable else 0o644) | 0o600
        if bool(pushed.mode & 0o100) == executable:
            return pushed.mode
        return pushed.mode | (pushed.mode & 0o444) >> 2 if executable else pushed.mode & ~0o111

    def _want(self, entry: Listed) -> None:
        if entry.size > self._limits.file_bytes:
            return  # stays without a digest: too large
        self._promised += blocks(entry.size)
        if self._promised > self._limits.total_bytes:
            raise over_total(self._limits)
        self._wanted.append(entry)

    def _ask(self) -> None:
        """Ask for more, in as few pieces as possible."""
        if not self._wanted or self._unanswered > _CREDIT // 2:
            return
        requests = bytearray()
        while self._wanted and self._unanswered < _CREDIT:
            entry = self._wanted.popleft()
            path = os.fsencode(entry.path) + b"\0"
            requests += path
            self._unanswered += len(path)
            self._asked.append(entry)
        self._parent.write(frame(REQUEST, bytes(requests)))
        self._parent.write(frame(PROGRESS, b"%d %d" % (self._blobs.total, self._promised)))
        self._parent.flush()

    def _answered(self, kind: bytes, data: bytes) -> None:
        entry = self._asked.popleft()
        self._unanswered -= len(os.fsencode(entry.path)) + 1
        if kind == UNREADABLE:
            if data:
                raise ProtocolError("a frame that must be empty is not")
            self._blobs.discard()
            return
        self._blobs.add(data)
        digest, size = self._blobs.finish()
        self.items[entry.path] = Item("file", self.items[entry.path].mode, size, digest)

    def _keep_held(self) -> None:
        """What is in a folder that could not be looked into stays as it was pushed: not known is not deleted."""
        if not self.held:
            return
        held = set(self.held)
        for path, item in self._pushed.items():
            above = path
            while above:
                above = above.rpartition("/")[0]
                if above in held:
                    self.items.setdefault(path, item)
                    break


def blocks(size: int) -> int:
    """What a file of `size` bytes takes on a disk; never nothing."""
    return max(-(-size // _BLOCK), 1) * _BLOCK


def over_total(limits: ReturnLimits) -> ProtocolError:
    """All files together pass the limit."""
    return ProtocolError(f"what came back takes more than {limits.total_bytes} bytes")
