"""A guest that lies, floods and falls silent, against the real receiver process: refused, nothing kept, nothing run."""

from __future__ import annotations

import io
import os
import socket
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from receiving import Guest, listing, record, repeats, returned, says, snapshot

from vmsandbox.errors import GuestError, HostError
from vmsandbox.receive.protocol import HELLO, ProtocolError, ReturnLimits, frame
from vmsandbox.receive.receiver import Blobs, HostFailed, Receiver
from vmsandbox.review.manifest import Item

CORPUS = Path(__file__).parent / "data/return-corpus"
LIMITS = ReturnLimits(total_bytes=4 << 20, file_bytes=1 << 20, entries=500, listing_bytes=1 << 20, seconds=60)
FOLDER, LINK, FILE = 0o40755, 0o120777, 0o100644


@pytest.fixture
def host(tmp_path: Path) -> Path:
    """A host's files beside the place where returns lie, and a record folder."""
    host = tmp_path / "host"
    (host / "project/.git/hooks").mkdir(parents=True)
    (host / "project/README").write_text("ours")
    (host / ".ssh").mkdir()
    (host / ".ssh/authorized_keys").write_text("ours")
    (host / "records").mkdir()
    return host


def refused(host: Path, guest: Guest, limits: ReturnLimits = LIMITS, **options: object) -> GuestError:
    """The error of a return that must leave the host as it was."""
    before = snapshot(host / "project"), snapshot(host / ".ssh")
    with pytest.raises(GuestError) as caught:
        returned(host / "records", guest, limits=limits, **options)  # type: ignore[arg-type]
    assert (snapshot(host / "project"), snapshot(host / ".ssh")) == before
    assert {path.name for path in (host / "records").iterdir()} <= {"pushed.jsonl", "baseline"}, "something was kept"
    assert not list(host.rglob("CANARY")) and not Path("CANARY").exists(), "a command ran"
    error = caught.value
    assert error.brief.isprintable() and "Traceback" not in error.details
    assert error.resolution
    return error


@pytest.mark.parametrize(
    "path",
    [
        "../x", "/abs", "a/../../x", ".", "..", "a//b", "", "a/", "./a", "../.ssh/authorized_keys",
        ".git", ".git/hooks/post-checkout", "a/.git/config", "x" * 256, "/".join("d" * 10_000), "y/" * 2500 + "y",
        b"a\0b", b"$(touch CANARY)\0`touch CANARY`",
    ],
)  # fmt: skip
def test_names_that_may_not_be(host: Path, path: str | bytes) -> None:
    assert "refused" in refused(host, says(listing(record(path)) + frame(b"F", b"x"))).brief


ATTACKS: dict[str, tuple[bytes, str]] = {
    "silent": (b"", "sent nothing"),
    "another version": (b"vmsandbox-return 2\n" + listing()[len(HELLO) :], "version"),
    "not the protocol": (b"Welcome to Debian\r\n" * 9, "version"),
    "terminal escapes": (b"\x1b]52;c;ZXZpbA==\x07" * 9, "version"),
    "cut off after the hello": (HELLO, "cut off"),
    "cut off within a length": (HELLO + b"L\0", "cut off"),
    "cut off within a frame": (HELLO + b"L\0\0\0\x09abc", "cut off"),
    "cut off within the listing": (HELLO + frame(b"L", record()), "cut off"),
    "cut off before a file": (listing(record()), "cut off"),
    "cut off within a file": (listing(record()) + frame(b"D", b"x"), "cut off"),
    "a listing that ends in a record": (HELLO + frame(b"L", b"100644 1 1 1 a") + frame(b"E"), "within an entry"),
    "a listing that ends before a target": (listing(record("l", LINK)), "target"),
    "a frame of 4 GiB": (HELLO + b"L\xff\xff\xff\xff", "bytes; "),
    "an unknown frame": (HELLO + frame(b"H", b"hard link"), "kind"),
    "a file before the listing": (HELLO + frame(b"F", b"x"), "kind"),
    "a file that nobody asked for": (listing() + frame(b"F", b"x") + frame(b"F", b"x"), ""),
    "a second listing": (listing(record()) + frame(b"E"), "kind"),
    "an empty frame": (HELLO + frame(b"L"), "nothing in it"),
    "an empty piece of a file": (listing(record()) + frame(b"D"), "nothing in it"),
    "an excuse with content": (listing(record()) + frame(b"U", b"sorry"), "must be empty"),
    "the same path twice": (listing(record(), record()) + frame(b"F", b"x") * 2, "twice"),
    "a file in a file": (listing(record("a"), record("a/b")) + frame(b"F", b"x") * 2, "contradicts"),
    "a file in no folder": (listing(record("a/b")) + frame(b"F", b"x"), "contradicts"),
    "a file through a link": (
        listing(record("d", LINK), b"../../project\0", record("d/README")) + frame(b"F", b"evil"), "contradicts",
    ),
    "a negative size": (listing(b"100644 -1 1 1 a\0"), "malformed"),
    "a size that is no number": (listing(b"100644 1e9 1 1 a\0"), "malformed"),
    "a size of 100 digits": (listing(b"100644 " + b"9" * 100 + b" 1 1 a\0"), "malformed"),
    "a mode that is not octal": (listing(b"100989 1 1 1 a\0"), "refused"),
    "a mode of 20 digits": (listing(b"7" * 20 + b" 1 1 1 a\0"), "no such mode"),
    "too few numbers": (listing(b"100644 1 a\0"), "malformed"),
    "an empty record": (listing(b"\0"), "malformed"),
    "an empty target": (listing(record("l", LINK), b"\0"), "target"),
    "an endless target": (listing(record("l", LINK), b"x" * 5000 + b"\0"), "target"),
    "a record without end": (HELLO + frame(b"L", b"1" * 20_000), "too long"),
    "a file that could not be looked into": (listing(record(), b"0 0 0 0 a\0"), "could not be looked into"),
    "too many files": (listing(*[record(str(n), size=0) for n in range(600)]), "more than 500 entries"),
    "more bytes than there may be": (listing(*[record(str(n), size=1 << 20) for n in range(9)]), "takes more than"),
}  # fmt: skip


@pytest.mark.parametrize("name", ATTACKS)
def test_streams_that_may_not_be(host: Path, name: str) -> None:
    stream, why = ATTACKS[name]
    if name == "a file that nobody asked for":  # the return is over before it: not even read
        assert returned(host / "records", says(stream), limits=LIMITS).quarantine.manifest.items == {}
        return
    assert why in refused(host, says(stream)).brief, name


@pytest.mark.parametrize(
    ("guest", "why"),
    [
        (repeats(HELLO, frame(b"L", b"".join(record(f"{n:08}" * 30, size=0) for n in range(1000)))), ""),
        (repeats(HELLO, frame(b"L", b"x" * 4000)), ""),
        (repeats(listing(record(size=10)), frame(b"D", b"x" * 65536)), "larger than"),
        (repeats(listing(record(size=10)), frame(b"D", b"x")), "larger than"),
        (repeats(b"", b"x" * 65536), "version"),
    ],
)  # fmt: skip
def test_streams_that_never_end(host: Path, guest: Guest, why: str) -> None:
    assert why in refused(host, guest).brief


def test_all_files_together_are_limited_by_what_arrives(host: Path) -> None:
    """Each claims one byte and sends a megabyte."""
    stream = listing(*[record(str(n), size=1) for n in range(9)]) + (frame(b"F", b"x" * (1 << 20)) * 9)
    assert "takes more than" in refused(host, says(stream)).brief


def test_a_listing_is_limited_in_bytes(host: Path) -> None:
    stream = listing(*[record(f"{number:0200}", size=0) for number in range(100)])
    assert "listing is longer" in refused(host, says(stream), ReturnLimits(listing_bytes=10_000)).brief


def test_a_guest_that_falls_silent_or_trickles(host: Path) -> None:
    def silent(sock: socket.socket) -> None:
        sock.sendall(HELLO)
        sock.recv(1)

    def trickles(sock: socket.socket) -> None:
        sock.sendall(listing(record(size=10)))
        while True:
            sock.sendall(frame(b"D", b"x"))
            time.sleep(0.05)

    slow = ReturnLimits(stall_seconds=1, stall_bytes=1000)
    began = time.monotonic()
    assert "too slowly" in refused(host, silent, slow).brief
    assert "too slowly" in refused(host, trickles, slow).brief
    assert "did not end" in refused(host, trickles, ReturnLimits(seconds=1)).brief
    assert time.monotonic() - began < 15


def test_a_sparse_file_of_a_tebibyte_is_not_asked_for(host: Path) -> None:
    stream = listing(record("sparse", size=1 << 40), record("b", size=1)) + frame(b"F", b"b")
    received = returned(host / "records", says(stream), limits=LIMITS)
    assert received.quarantine.manifest.items["sparse"] == Item("file", 0o644, 1 << 40, None)
    assert received.files == 1 and received.transferred < 1000


def test_a_lie_in_the_baseline_only_brings_back_what_was_pushed(host: Path) -> None:
    """Whatever the guest says it had at the push: `unchanged` means the host's own digest, or nothing."""
    pushed = {"a": Item("file", 0o644, 1, "aa" * 32)}
    old, other = record("a", ctime=5), record("evil", ctime=5)
    baseline = listing(old, other, record("b", ctime=5_000_000_000))
    stream = listing(old, other) + frame(b"F", b"x")
    items = returned(host / "records", says(stream), pushed, baseline).quarantine.manifest.items
    assert items["a"] == pushed["a"]
    assert items["evil"].sha256 == "2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881", "not fetched"


@pytest.mark.parametrize("baseline", [b"", b"nonsense", HELLO, listing(record("../x")), HELLO + frame(b"F", b"x")])
def test_a_damaged_baseline(host: Path, baseline: bytes) -> None:
    refused(host, says(listing()), baseline=baseline)


def test_names_of_odd_bytes_come_as_they_are(host: Path) -> None:
    names = [
        b"new\nline",
        b"back\\slash",
        b"\xff\xfe",
        b"\x1b]52;c;x\x07",
        "é".encode(),
        b"-rf",
        b" ",
        b"$(touch CANARY)",
    ]
    stream = listing(*[record(name) for name in names]) + frame(b"F", b"x") * len(names)
    items = returned(host / "records", says(stream), limits=LIMITS).quarantine.manifest.items
    assert {os.fsencode(path) for path in items} == set(names)
    blobs = [path.name for path in (host / "records/quarantine/blobs").iterdir()]
    assert blobs == ["2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881"], "a guest's name on the host"
    assert not list(host.rglob("CANARY"))


def test_special_files_are_told_and_nothing_else(host: Path) -> None:
    forms = {"fifo": 0o010644, "char": 0o020666, "block": 0o060666, "socket": 0o140777, "whiteout": 0o160000}
    stream = listing(*[record(name, mode) for name, mode in forms.items()])
    items = returned(host / "records", says(stream), limits=LIMITS).quarantine.manifest.items
    assert {item.kind for item in items.values()} == {"other"} and set(items) == set(forms)


@pytest.mark.parametrize(
    ("pushed", "now", "kept"),
    [
        (None, 0o104777, 0o755), (None, 0o102666, 0o644), (None, 0o100600, 0o600), (None, 0o100700, 0o700),
        (None, 0o100000, 0o600), (0o600, 0o100644, 0o600), (0o600, 0o100755, 0o700), (0o644, 0o100600, 0o644),
        (0o755, 0o100644, 0o644), (0o700, 0o100600, 0o600), (0o644, 0o106777, 0o755), (0o444, 0o100777, 0o555),
    ],
)  # fmt: skip
def test_modes(host: Path, pushed: int | None, now: int, kept: int) -> None:
    before = {"a": Item("file", pushed, 1, "aa" * 32)} if pushed is not None else {}
    stream = listing(record("a", now), record("d", 0o41777), record("e", 0o40700)) + frame(b"F", b"x")
    items = returned(host / "records", says(stream), before).quarantine.manifest.items
    assert items["a"].mode == kept
    assert items["d"].mode == 0o755 and items["e"].mode == 0o700


def test_a_full_disk_is_the_hosts_fault(host: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A file system of 64 KiB."""
    if os.geteuid() != 0:
        pytest.skip("needs to mount")
    import subprocess

    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", small], check=False).returncode != 0:
        pytest.skip("may not mount")
    try:
        stream = listing(record(size=500_000)) + frame(b"F", b"x" * 500_000)
        with pytest.raises(HostError, match="quarantine cannot be written"):
            returned(small, says(stream))
        assert not (small / "quarantine").exists()
    finally:
        subprocess.run(["umount", small], check=True)


# -- arbitrary bytes, in this process: nothing but the two errors may come out ---------------------------------


def parse(folder: Path, stream: bytes) -> None:
    blobs = folder / "blobs"
    blobs.mkdir(exist_ok=True)
    for left in blobs.iterdir():
        left.unlink()
    fd = os.open(blobs, os.O_RDONLY | os.O_DIRECTORY)
    limits = ReturnLimits(total_bytes=1 << 16, file_bytes=1 << 14, entries=20, listing_bytes=1 << 14)
    pushed = {"a": Item("file", 0o644, 1, "aa" * 32), "d": Item("dir", 0o755), "d/x": Item("file", 0o600, 0, "bb" * 32)}
    try:
        Receiver(io.BytesIO(stream), io.BytesIO(), Blobs(fd, limits), pushed, {record("a")[:-1]: "a"}, limits).run()
    except (ProtocolError, HostFailed):
        pass
    finally:
        os.close(fd)
    assert sorted(folder.iterdir()) == [blobs], "something was written beside the blobs"
    assert sum(path.stat().st_size for path in blobs.iterdir()) <= 1 << 16


SEEDS = sorted(CORPUS.glob("*.bin"))
RECORDS = st.builds(
    record,
    st.one_of(st.binary(max_size=12), st.sampled_from([b"a", b"d", b"d/x", b"../x", b".git", b"d/../y"])),
    st.sampled_from([FILE, FOLDER, LINK, 0, 0o010644, 0o104755]),
    st.integers(0, 1 << 15),
    st.integers(0, 9),
)
FRAMES = st.one_of(
    st.builds(frame, st.just(b"L"), st.lists(RECORDS, max_size=4).map(b"".join)),
    st.builds(frame, st.sampled_from([b"D", b"F", b"U", b"E", b"X"]), st.binary(max_size=40)),
    st.just(frame(b"E")),
)
SETTINGS = settings(
    max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


@SETTINGS
@given(st.lists(FRAMES, max_size=8).map(b"".join))
@example(b"")
def test_arbitrary_frames(tmp_path: Path, stream: bytes) -> None:
    parse(tmp_path, HELLO + stream)


@SETTINGS
@given(st.sampled_from(SEEDS), st.lists(st.tuples(st.integers(0, 4000), st.binary(max_size=6)), max_size=5))
def test_mutations_of_the_corpus(tmp_path: Path, seed: Path, changes: list[tuple[int, bytes]]) -> None:
    stream = bytearray(seed.read_bytes())
    for at, content in changes:
        at %= len(stream) + 1
        stream[at : at + len(content)] = content
    parse(tmp_path, bytes(stream))


@pytest.mark.parametrize("seed", SEEDS, ids=lambda path: path.stem)
def test_the_corpus(tmp_path: Path, host: Path, seed: Path) -> None:
    """What was found once is tried for ever, on the real process too."""
    (tmp_path / "parsed").mkdir()
    parse(tmp_path / "parsed", seed.read_bytes())
    if seed.stem.startswith("bad-"):
        refused(host, says(seed.read_bytes()))
    else:
        returned(host / "records", says(seed.read_bytes()), limits=LIMITS)
