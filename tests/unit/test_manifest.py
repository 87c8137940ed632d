"""The manifest, and its reader against a guest that lies."""

from __future__ import annotations

import json
import os

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vmsandbox.errors import GuestError
from vmsandbox.review.manifest import Item, Manifest, ManifestLimits, parse_untrusted_manifest
from vmsandbox.review.text import shown, shown_bytes

HEX = "ab" * 32


def line(path: object = "a", **changes: object) -> bytes:
    record = {"path": path, "kind": "file", "mode": 420, "size": 1, "sha256": HEX} | changes
    return json.dumps({key: value for key, value in record.items() if value is not ...}).encode() + b"\n"


def folder(path: str) -> bytes:
    return json.dumps({"path": path, "kind": "dir", "mode": 493}).encode() + b"\n"


def end(entries: object = 1) -> bytes:
    return json.dumps({"entries": entries}).encode() + b"\n"


def refused(*lines: bytes, limits: ManifestLimits | None = None) -> GuestError:
    with pytest.raises(GuestError) as caught:
        parse_untrusted_manifest(lines, limits)
    assert caught.value.brief.isprintable() and caught.value.details.isprintable()
    return caught.value


def test_reads_what_it_writes_cut_anywhere() -> None:
    manifest = Manifest({
        "b": Item("dir", 0o755),
        "b/ü": Item("file", 0o644, 3, HEX),
        os.fsdecode(b"b/\xff\n\""): Item("file", 0o600, 0, None),
        "a": Item("symlink", 0, target=os.fsdecode(b"../\xfe")),
        "pipe": Item("other", 0o600),
    })  # fmt: skip
    whole = b"".join(manifest.lines())
    assert parse_untrusted_manifest([whole]) == manifest
    assert parse_untrusted_manifest([whole[i : i + 1] for i in range(len(whole))]) == manifest
    assert parse_untrusted_manifest([whole.rstrip()]).digest == manifest.digest
    assert whole.isascii()


def test_the_digest_does_not_depend_on_order_and_tells_every_difference() -> None:
    one = {"a": Item("file", 0o644, 1, HEX), "b": Item("dir", 0o755)}
    digest = Manifest(one).digest
    assert Manifest(dict(reversed(one.items()))).digest == digest
    for path, item in (
        ("a", Item("file", 0o645, 1, HEX)),
        ("a", Item("file", 0o644, 2, HEX)),
        ("c", one["b"]),
    ):
        assert Manifest({**one, path: item}).digest != digest


@pytest.mark.parametrize(
    "path",
    [
        "", "/", "/etc/passwd", "../x", "a/../../x", "..", ".", "./a", "a/.", "a//b", "a/", "nul\0",
        "x" * 256,
        "é" * 128, ".git", ".git/hooks/x", "a/.git/config", "/".join("d" * 200), "y/" * 2500 + "y",
        7, None, ["a"],
        "\ud800", "\udcc3\udca9", "\udbff\udfff\ud800", True,
    ],
)  # fmt: skip
def test_paths_that_may_not_be(path: object) -> None:
    assert "malformed: line 1" in refused(line(path), end()).brief


@pytest.mark.parametrize(
    "bad",
    [
        line(kind="hardlink"), line(kind=["file"]), line(mode=-1), line(mode=1 << 40), line(mode="420"),
        line(mode=True),
        line(mode=4.0), line(size=-1), line(size=1 << 63), line(size=None), line(sha256="x" * 64),
        line(sha256=HEX.upper()), line(sha256=HEX[1:]), line(sha256=7), line(owner=0), line(size=...),
        line(kind=...),
        line(kind="symlink"), line(kind="dir"), b"[]\n", b"7\n", b"null\n", b"\n", b"{\n", b"\xff\n", b"{}\n",
        b'{"path":"a","path":"b","kind":"dir","mode":1}\n', b"[" * 30000 + b"\n", b'{"entries":1}\n',
        b'{"entries":true}\n', b'{"entries":0.0}\n', b'{"path":"a","kind":"symlink","target":""}\n',
        b'{"path":"a","kind":"symlink","target":"x\\u0000"}\n', b'{"path":"a","kind":"dir","mode":NaN}\n',
        b'{"path":"a","kind":"dir","mode":' + b"9" * 5000 + b"}\n", b"\x1b]52;c;x\x07\n",
    ],
)  # fmt: skip
def test_lines_that_may_not_be(bad: bytes) -> None:
    assert "line 1" in refused(bad, end()).brief


def test_modes_are_masked() -> None:
    assert parse_untrusted_manifest([line(mode=0o106755), end()]).items["a"].mode == 0o755


def test_a_report_must_be_whole_and_agree_with_itself() -> None:
    assert "cut off" in refused(line()).brief
    assert "cut off" in refused().brief
    refused(line(), end(2))
    refused(line(), line(), end(2))  # twice
    refused(line(), end(), line("b"))  # after the end
    assert "contradicts" in refused(line("a/b"), end()).brief  # no folder a
    refused(line("a"), line("a/b"), end(2))  # a is a file
    assert set(parse_untrusted_manifest([line("a/b"), folder("a"), end(2)]).items) == {"a", "a/b"}


def test_limits() -> None:
    assert "2 files" in refused(*(line(str(n)) for n in range(9)), limits=ManifestLimits(entries=2)).brief
    assert "line of more" in refused(b"x" * 5000, limits=ManifestLimits(line=1000)).brief
    assert "longer than" in refused(*[b" " * 1000] * 2000, limits=ManifestLimits(bytes=1 << 20, line=1 << 30)).brief

    taken = 0

    def endless() -> object:
        nonlocal taken
        while True:
            taken += 1
            yield b"\n" * 1000

    refused(*[], limits=None)
    with pytest.raises(GuestError):
        parse_untrusted_manifest(endless())  # type: ignore[arg-type]
    assert taken == 1


@given(st.lists(st.binary(max_size=200), max_size=10))
def test_arbitrary_bytes_are_refused_and_never_crash(chunks: list[bytes]) -> None:
    try:
        parse_untrusted_manifest(chunks)
    except GuestError as error:
        assert (error.brief + error.details).isprintable()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=20)
    | st.sampled_from(["file", "dir", "symlink", "other", "a", "../a", HEX]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip
KEYS = st.sampled_from(["path", "kind", "mode", "size", "sha256", "target", "entries", "x"])


@settings(max_examples=300, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.dictionaries(KEYS, JSON, max_size=6), max_size=4))
def test_arbitrary_objects_are_refused_and_never_crash(records: list[dict[str, object]]) -> None:
    try:
        manifest = parse_untrusted_manifest([json.dumps(record).encode() + b"\n" for record in records])
    except GuestError:
        return
    manifest.collisions()
    assert manifest.digest


def test_names_that_a_folding_file_system_takes_for_one_are_found() -> None:
    item = Item("file", 0o644, 0, HEX)
    names = [
        "README",
        "readme",
        "e\u0301",
        "\u00e9",
        "\u00c9",
        "other",
        "straße",
        "STRASSE",
        os.fsdecode(b"\xff"),
    ]
    assert Manifest(dict.fromkeys(names, item)).collisions() == [
        ("README", "readme"), ("STRASSE", "straße"), ("e\u0301", "\u00c9", "\u00e9"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "safe"),
    [
        ("plain/päth name.py", "plain/päth name.py"),
        ("\x1b]52;c;x\x07", "\\x1b]52;c;x\\x07"),
        ("a\nb\rc\td", "a\\x0ab\\x0dc\\x09d"),
        ("exe\u202etxt", "exe\\u202etxt"),
        ("zero\u200bwidth\ufeff", "zero\\u200bwidth\\ufeff"),
        ("tag\U000e0041", "tag\\U000e0041"),
        ("fill\u3164\u2800\ufe0f", "fill\\u3164\\u2800\\ufe0f"),
        ("csi\x9b31m", "csi\\u009b31m"),
        (os.fsdecode(b"\xff\x9b"), "\\xff\\x9b"),
        ("back\\slash\\x1b", "back\\\\slash\\\\x1b"),
        ("nbsp\u00a0line\u2028", "nbsp\\u00a0line\\u2028"),
        ("\u0301a/\u0301b", "\\u0301a/\\u0301b"),
        ("e\u0301", "e\u0301"),
        ("lone\ud800", "lone\\ud800"),
    ],
)  # fmt: skip
def test_shown(text: str, safe: str) -> None:
    assert shown(text) == safe


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(st.text(st.characters(), max_size=30), st.text(st.characters(), max_size=30))
def test_shown_is_printable_and_tells_texts_apart(one: str, other: str) -> None:
    assert shown(one).isprintable()
    shown(one).encode()  # no surrogates are left
    assert (shown(one) == shown(other)) == (one == other)
    assert len(shown(one, 5)) <= 5
    assert shown_bytes(one.encode("utf-8", "replace")).isprintable()
