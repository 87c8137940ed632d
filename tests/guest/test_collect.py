"""What comes back from real guests: an honest one's work exactly, a hostile one's nothing."""

from __future__ import annotations

import base64
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from harness import Cli, Guest, make_tree
from rooted import RootedGuest

from vmsandbox.errors import GuestError
from vmsandbox.receive.protocol import ReturnLimits
from vmsandbox.receive.store import Quarantine
from vmsandbox.review.changes import compare
from vmsandbox.session.sandbox import Sandbox
from vmsandbox.session.transfer.collect import SENDER, Collected, collect

SMALL = ReturnLimits(
    total_bytes=16 << 20, file_bytes=4 << 20, entries=2000, listing_bytes=1 << 20, seconds=60, stall_seconds=8
)


@contextmanager
def attached(guest: Guest) -> Iterator[Sandbox]:
    sandbox = Sandbox.attach(guest.name, layout=guest.cli.layout)
    try:
        yield sandbox
    finally:
        sandbox.disconnect()


def collected(guest: Guest, limits: ReturnLimits | None = None) -> Collected:
    with attached(guest) as sandbox:
        return collect(sandbox, limits=limits)


def content(quarantine: Quarantine, path: str) -> bytes:
    digest = quarantine.manifest.items[path].sha256
    assert digest is not None
    stream = quarantine.open(digest)
    assert stream is not None, path
    with stream:
        return stream.read()


def test_the_work_of_an_honest_guest(cli: Cli, fork: Callable[..., Guest], tmp_path: Path) -> None:
    files: dict[str, bytes | str] = {f"data/{number}": os.urandom(9000) for number in range(300)}
    files |= {"edit.txt": "before\n", "gone.txt": "x", "tool.sh": "#!/bin/sh\n", "old name.txt": "the same\n" * 9}
    root = make_tree(tmp_path / "app", files)
    (root / "edit.txt").chmod(0o600)
    guest = fork(root)
    first = collected(guest)
    assert compare(first.pushed, first.returned).is_empty and first.files == 0
    assert first.transferred < 600_000, "what was not touched has travelled"

    guest.sh(
        "echo after > edit.txt; chmod 666 edit.txt; rm gone.txt; chmod 755 tool.sh; mv 'old name.txt' new.txt;"
        "mkdir -p sub/dir .git/hooks; echo new > sub/dir/new; ln -s ../../../etc/passwd sub/link; echo x > .git/config;"
        "mkfifo sub/fifo; truncate -s 1T sub/sparse; echo y > sub/closed; chmod 0 sub/closed; touch data/7"
    )
    second = collected(guest)
    changes = compare(second.pushed, second.returned)
    assert [one.path for one in changes.modified] == ["edit.txt"]
    assert [one.path for one in changes.deleted] == ["gone.txt"]
    assert [one.path for one in changes.mode_changed] == ["tool.sh"]
    assert [(one.old, one.new) for one in changes.renamed] == [("old name.txt", "new.txt")]
    assert [one.path for one in changes.added] == [
        "sub", "sub/closed", "sub/dir", "sub/dir/new", "sub/fifo", "sub/link", "sub/sparse",
    ]  # fmt: skip
    assert [row.path for row in second.refused] == ["sub/closed", "sub/fifo", "sub/sparse"]
    assert second.returned.items["edit.txt"].mode == 0o600
    assert second.returned.items["sub/link"].target == "../../../etc/passwd"
    assert content(second.quarantine, "edit.txt") == b"after\n"
    assert content(second.quarantine, "sub/dir/new") == b"new\n"
    record = guest.folder.record_folder(guest.info.id)
    assert Quarantine.load(record / "quarantine", second.quarantine.digest) == second.quarantine
    assert [path.name for path in record.glob("quarantine*")] == ["quarantine"]
    event = guest.journal()[-1]
    assert event["kind"] == "return.received" and event["data"]["manifest"] == second.quarantine.digest
    assert event["data"]["refused"] == ["sub/closed", "sub/fifo", "sub/sparse"]

    guest.sh("(while sleep 0.01; do head -c 20000 /dev/urandom >> growing; done) >/dev/null 2>&1 & echo $! > /tmp/pid")
    third = collected(guest)
    assert len(content(third.quarantine, "growing")) == third.returned.items["growing"].size
    guest.sh("kill $(cat /tmp/pid)")


PRELUDE = """#!/usr/bin/python3 -IS
import os, sys, time
def say(data):
    while data:
        data = data[os.write(1, data):]
def frame(kind, data=b""):
    say(kind + len(data).to_bytes(4, "big") + data)
def listed(*records):
    say(b"vmsandbox-return 1\\n")
    frame(b"L", b"".join(record + b"\\0" for record in records))
    frame(b"E")
"""
LIES = {
    "traversal": ("listed(b'100644 1 1 1 ../../../x'); frame(b'F', b'x')", "refused"),
    "absolute": ("listed(b'100644 1 1 1 /root/.ssh/authorized_keys'); frame(b'F', b'x')", "refused"),
    "hooks": ("listed(b'40755 1 1 1 .git', b'100755 1 1 1 .git/post-checkout'); frame(b'F', b'x')", "refused"),
    "through a link": (
        "listed(b'120777 1 1 1 d', b'/tmp', b'100644 1 1 1 d/CANARY'); frame(b'F', b'x')", "contradicts",
    ),
    "escapes": ("say(b'\\033]52;c;eA==\\007\\033[2J' * 9)", "version"),
    "nothing": ("sys.stderr.write('\\033[31msorry')", "sent nothing"),
    "cut off": ("say(b'vmsandbox-return 1\\nL\\0\\0')", "cut off"),
    "endless listing": (
        "say(b'vmsandbox-return 1\\n')\nwhile True: frame(b'L', b'100644 0 1 1 %d\\0' % time.monotonic_ns())",
        "entries",
    ),
    "endless file": ("listed(b'100644 5 1 1 a')\nwhile True: frame(b'D', b'x' * 200000)", "larger than"),
    "endless nonsense": ("while True: say(b'y\\n' * 50000)", "version"),
    "ten thousand deep": ("listed(b'40755 1 1 1 ' + b'd/' * 10000 + b'd')", "4096 bytes"),
    "silent": ("listed(b'100644 5 1 1 a'); time.sleep(600)", "too slowly"),
}  # fmt: skip


@pytest.fixture(scope="module")
def liar(make_rooted: Callable[[], RootedGuest]) -> RootedGuest:
    return make_rooted()


def test_a_hostile_sender(liar: RootedGuest, tmp_path: Path) -> None:
    """Guest root replaces the sender: each lie is refused, nothing of it is kept, and the host's tree stays."""
    guest = liar
    root = make_tree(tmp_path / "app", {"README": "ours\n", "src/a.py": "a = 1\n"})
    with attached(guest) as sandbox:
        sandbox.push(root)
    good = collected(guest)
    record = guest.folder.record_folder(guest.info.id)
    before = {path: path.stat().st_mtime_ns for path in sorted(root.rglob("*"))}

    def becomes(script: str) -> None:
        text = base64.b64encode((PRELUDE + script + "\n").encode()).decode()
        guest.root(f"echo {text} | base64 -d > {SENDER}; chmod 755 {SENDER}")

    for name, (script, why) in LIES.items():
        becomes(script)
        began = time.monotonic()
        with pytest.raises(GuestError) as caught:
            collected(guest, replace(SMALL, stall_seconds=3) if name == "silent" else SMALL)
        error = caught.value
        assert why in error.brief, f"{name}: {error.brief} {error.details}"
        assert (error.brief + error.details.replace("\n", "")).isprintable(), name
        assert time.monotonic() - began < 45, name
        assert [path.name for path in record.glob("quarantine*")] == ["quarantine"], name
        assert guest.journal()[-1]["kind"] == "return.refused"
    assert Quarantine.load(record / "quarantine") == good.quarantine, "a refused return took the last good one away"
    assert {path: path.stat().st_mtime_ns for path in sorted(root.rglob("*"))} == before
    assert not Path("/tmp/CANARY").exists()

    becomes("listed(b'100644 %d 1 1 sparse' % (1 << 40), b'10644 0 1 1 fifo', b'106777 1 1 1 run'); frame(b'F', b'x')")
    last = collected(guest, SMALL)
    assert [row.path for row in last.refused] == ["fifo", "sparse"]
    assert last.returned.items["run"].mode == 0o755
    assert [path.name for path in last.quarantine.blobs.iterdir()] == [last.returned.items["run"].sha256]
