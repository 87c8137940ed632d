"""Drives the real receiver process: the guest's side is fixed bytes, a function, or the real sender."""

from __future__ import annotations

import hashlib
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from vmsandbox.process import Programs
from vmsandbox.receive.protocol import HELLO, ReturnLimits, frame
from vmsandbox.receive.start import Received, receive
from vmsandbox.review.manifest import Item, Manifest

SENDER = Path(__file__).parents[2] / "cloudinit/guest/vmsandbox-return"
Guest = Callable[[socket.socket], None]


class SocketWire:
    """A socket with the manners of an SSH channel."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self.recv = sock.recv
        self.sendall = sock.sendall

    def shutdown_write(self) -> None:
        with suppress(OSError):
            self._sock.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        with suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)


def record(path: str | bytes = b"a", mode: int = 0o100644, size: int = 1, ctime: int = 7) -> bytes:
    """One entry of a listing."""
    return b"%o %d 1 %d %s\0" % (mode, size, ctime, os.fsencode(path))


def listing(*records: bytes) -> bytes:
    """A whole listing of these records, in one frame."""
    return HELLO + (frame(b"L", b"".join(records)) if records else b"") + frame(b"E")


def says(stream: bytes) -> Guest:
    """A guest that says this whatever it is asked, and then nothing more."""

    def guest(sock: socket.socket) -> None:
        sock.sendall(stream)
        sock.shutdown(socket.SHUT_WR)
        while sock.recv(1 << 16):
            pass

    return guest


def repeats(start: bytes, again: bytes) -> Guest:
    """A guest that never stops."""

    def guest(sock: socket.socket) -> None:
        sock.sendall(start)
        while True:
            sock.sendall(again)

    return guest


def returned(
    folder: Path,
    guest: Guest,
    pushed: dict[str, Item] | None = None,
    baseline: bytes | None = None,
    limits: ReturnLimits | None = None,
    programs: Programs | None = None,
) -> Received:
    """One return into `folder`/quarantine."""
    manifest = Manifest(pushed or {})
    pushed_file, baseline_file = folder / "pushed.jsonl", folder / "baseline"
    pushed_file.write_bytes(b"".join(manifest.lines()))
    if baseline is not None:
        baseline_file.write_bytes(baseline)
    ours, theirs = socket.socketpair()

    def play() -> None:
        with suppress(OSError), theirs:
            guest(theirs)

    thread = threading.Thread(target=play, daemon=True)
    thread.start()
    try:
        return receive(
            SocketWire(ours), folder / "quarantine", manifest, pushed_file,
            baseline_file if baseline is not None else None, limits=limits, programs=programs,
        )  # fmt: skip
    finally:
        ours.close()
        thread.join(10)


def from_tree(folder: Path, tree: Path, **options: object) -> Received:
    """One return by the program that runs in guests."""

    def guest(sock: socket.socket) -> None:
        subprocess.run([sys.executable, "-IS", SENDER, tree], stdin=sock, stdout=sock, check=False, timeout=120)

    return returned(folder, guest, **options)  # type: ignore[arg-type]


def baseline_of(tree: Path) -> bytes:
    """What the guest's program lists right after a push."""
    argv = [sys.executable, "-IS", SENDER, "--baseline", tree]
    return subprocess.run(argv, input=b"unpacked\n", capture_output=True, check=True, timeout=60).stdout


def pushed_tree(tree: Path) -> dict[str, Item]:
    """The manifest that a push of this tree would have made (files and folders)."""
    found: dict[str, Item] = {}
    for path in sorted(tree.rglob("*")):
        name, mode = os.fspath(path.relative_to(tree)), path.lstat().st_mode & 0o777
        if path.is_symlink():
            found[name] = Item("symlink", 0, target=os.readlink(path))
        elif path.is_dir():
            found[name] = Item("dir", mode)
        else:
            content = path.read_bytes()
            found[name] = Item("file", mode, len(content), sha256(content))
    return found


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def snapshot(folder: Path) -> dict[str, tuple[int, bytes | str]]:
    """All that is in a folder: modes, contents, targets."""
    found: dict[str, tuple[int, bytes | str]] = {}
    for path in sorted(folder.rglob("*")):
        status = path.lstat()
        content: bytes | str = b""
        if path.is_symlink():
            content = os.readlink(path)
        elif path.is_file():
            content = path.read_bytes()
        found[os.fspath(path.relative_to(folder))] = (status.st_mode, content)
    return found
