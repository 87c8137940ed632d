"""The parent believes its receiver no more than a guest: a receiver that was taken over gains nothing."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
from receiving import listing, returned, says, sha256

from vmsandbox.errors import GuestError, HostError
from vmsandbox.process import Piped, Programs
from vmsandbox.receive.protocol import ReturnLimits
from vmsandbox.receive.store import Quarantine
from vmsandbox.review.manifest import Item
from vmsandbox.session.transfer.collect import _clear_interrupted

PRELUDE = """
import json, os, sys, time
folder = json.loads(sys.argv[1])["folder"]
def say(data):
    while data:
        data = data[os.write(1, data):]
def frame(kind, data=b""):
    say(kind + len(data).to_bytes(4, "big") + data)
def blob(name, content, **more):
    fd = os.open(name, os.O_WRONLY | os.O_CREAT, 0o600, dir_fd=folder)
    os.write(fd, content)
    os.close(fd)
def done(*lines, held=()):
    lines = (*lines, b'{"entries":%d}' % len(lines))
    frame(b"M", b"\\n".join(lines))
    frame(b"O", json.dumps({"held": list(held), "confined": []}).encode())
def file(path, content, size=None):
    facts = {"path": path, "kind": "file", "mode": 420, "size": len(content) if size is None else size}
    return json.dumps(facts | {"sha256": hashlib.sha256(content).hexdigest()}).encode()
import hashlib
X = hashlib.sha256(b"x").hexdigest()
"""


class Taken(Programs):
    """Starts something else where the receiver should be, with what the receiver is given."""

    def __init__(self, script: str) -> None:
        self._script = PRELUDE + script

    @contextmanager
    def piped(self, argv: Sequence[str | Path], *, pass_fds: Sequence[int] = ()) -> Iterator[Piped]:
        with super().piped([sys.executable, "-IS", "-c", self._script, argv[-1]], pass_fds=pass_fds) as child:
            yield child


def outcome(tmp_path: Path, script: str, **options: object) -> GuestError | HostError:
    with pytest.raises((GuestError, HostError)) as caught:
        returned(tmp_path, says(listing()), programs=Taken(script), **options)  # type: ignore[arg-type]
    assert not (tmp_path / "quarantine").exists()
    error = caught.value
    assert (error.brief + error.details).isprintable() and len(error.brief + error.details) < 3000
    assert isinstance(error, (GuestError, HostError))
    return error


@pytest.mark.parametrize(
    ("script", "why"),
    [
        ("done(file('a', b'x'))", "do not agree"),
        ("blob(X, b'xx'); done(file('a', b'x'))", "do not agree"),
        ("k = '../../kept'; blob(k, b'x'); os.link(k, X, src_dir_fd=folder, dst_dir_fd=folder); done(file('a', b'x'))",
         "not agree"),
        ("os.symlink('/etc/hostname', X, dir_fd=folder); done(file('a', b'x'))", "do not agree"),
        ("os.mkfifo(X, dir_fd=folder); done(file('a', b'x', 0))", "do not agree"),
        ("blob(X, b'x'); done(file('../a', b'x'))", "malformed"),
        ("blob(X, b'x'); done(file('.git/hooks/x', b'x'))", "malformed"),
        ("blob(X, b'x'); done(file('none/a', b'x'))", "contradicts"),
        ("frame(b'O', b'[]')", "receiver ended"),
        ("frame(b'O', b'{')", "receiver ended"),
        ("frame(b'O', json.dumps({'held': [7], 'confined': []}).encode())", "receiver ended"),
        ("frame(b'X', b'{}')", "receiver ended"),
        ("frame(b'P', b'no numbers')", "receiver ended"),
        ("frame(b'?', b'')", "receiver ended"),
        ("say(b'M\\xff\\xff\\xff\\xff')", "receiver ended"),
        ("while True: frame(b'M', b'x' * 100000)", "too long"),
        ("while True: frame(b'G', b'\\0'.join(b'%d' % (time.monotonic_ns() + n) for n in range(9999)))", "too long"),
        ("sys.exit('\\033[31mcrashed')", "receiver ended"),
        ("os.abort()", "receiver ended"),
        ("frame(b'X', json.dumps({'fault': 'guest', 'brief': '\\033]52;c;x', 'details': 'y' * 9999}).encode())", "x1b"),
        ("time.sleep(60)", "did not end"),
    ],
)  # fmt: skip
def test_a_receiver_that_lies(tmp_path: Path, script: str, why: str) -> None:
    limits = ReturnLimits(listing_bytes=1 << 18, entries=10_000, seconds=3)
    error = outcome(tmp_path, script, limits=limits)
    assert why in error.brief, f"{error.brief}: {error.details}"


def test_what_the_receiver_leaves_beside_the_blobs_goes(tmp_path: Path) -> None:
    script = "blob(X, b'x'); blob('evil.sh', b'y'); os.symlink('/', 'z', dir_fd=folder); done(file('a', b'x'))"
    received = returned(tmp_path, says(listing()), programs=Taken(script))
    assert [path.name for path in received.quarantine.blobs.iterdir()] == [sha256(b"x")]


def test_a_file_below_what_became_a_link_is_refused(tmp_path: Path) -> None:
    """A delta that is well formed by itself, and contradicts what was pushed."""
    pushed = {"d": Item("dir", 0o755), "d/a": Item("file", 0o644, 1, "aa" * 32)}
    link = json.dumps({"path": "d", "kind": "symlink", "target": "/etc"})
    assert "contradicts" in outcome(tmp_path, f"done({link!r}.encode())", pushed=pushed).brief
    received = returned(
        tmp_path, says(listing()), pushed, programs=Taken(f"frame(b'G', b'd/a'); done({link!r}.encode())")
    )
    assert set(received.quarantine.manifest.items) == {"d"}


def test_a_return_that_was_killed_while_it_was_published(tmp_path: Path) -> None:
    """At each moment of it the last whole return is there, or can be told from what is half."""
    whole = returned(tmp_path, says(listing())).quarantine
    (tmp_path / "quarantine").rename(tmp_path / "quarantine.ab12.old")
    (tmp_path / "quarantine.ab12").mkdir()
    _clear_interrupted(tmp_path)
    assert Quarantine.load(tmp_path / "quarantine") == whole
    assert [path.name for path in tmp_path.glob("quarantine*")] == ["quarantine"]
    (tmp_path / "quarantine.cd34/blobs").mkdir(parents=True)
    _clear_interrupted(tmp_path)
    assert Quarantine.load(tmp_path / "quarantine", whole.digest) == whole
    assert [path.name for path in tmp_path.glob("quarantine*")] == ["quarantine"]


def test_a_quarantine_that_is_not_the_reviewed_one(tmp_path: Path) -> None:
    whole = returned(tmp_path, says(listing())).quarantine
    with pytest.raises(HostError, match="not the one that was reviewed"):
        Quarantine.load(whole.folder, "0" * 64)
    manifest = whole.folder / "manifest.jsonl"
    manifest.chmod(0o600)
    manifest.write_bytes(b'{"path":"a","kind":"dir","mode":493}\n{"entries":1}\n')
    with pytest.raises(HostError, match="not the one that was reviewed"):
        Quarantine.load(whole.folder)
