"""What a hostile guest writes to the terminal: only text and colours arrive, however it is cut into pieces."""

from __future__ import annotations

import itertools
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmsandbox.review.terminal import TerminalFilter

_COLOUR = re.compile(rb"\x1b\[[0-9;:]*m")


def filtered(*pieces: bytes) -> bytes:
    safe = TerminalFilter()
    return b"".join(safe.feed(piece) for piece in pieces)


@pytest.mark.parametrize(
    "text", ["plain\n", "a\tb\r\n", "\x1b[31mred\x1b[0m", "\x1b[38;5;200mx\x1b[m", "\x1b[38:2::1:2:3mx", "ü€😀\n"]
)
def test_text_and_colours_pass(text: str) -> None:
    assert filtered(text.encode()) == text.encode()


@pytest.mark.parametrize(
    "attack",
    [
        b"\x1b]52;c;aGVsbG8=\x07",  # OSC 52: sets the clipboard
        b"\x1b]52;c;?\x1b\\",  # OSC 52: asks for it
        b"\x1b]0;title\x07",
        b"\x1b[21t",  # reports the title as typed text
        b"\x1bP$qm\x1b\\",  # DECRQSS
        b"\x1bP+q544e\x1b\\",  # XTGETTCAP
        b"\x1b[c", b"\x1b[>c", b"\x1b[5n", b"\x1b[6n", b"\x1b[?6n", b"\x1b[18t", b"\x1bZ", b"\x05",  # queries
        b"\x1b_application\x1b\\", b"\x1b^privacy\x1b\\", b"\x1bXstart\x1b\\",
        b"\x1b[2J", b"\x1b[H", b"\x1b[10A", b"\x1b[?1049h", b"\x1b[?2004h", b"\x1b[?1000h", b"\x1bc", b"\x1b7\x1b8",
        b"\x08\x08\x08", b"\x0b", b"\x0c", b"\x0e", b"\x7f", b"\x00",
        b"\x1b]8;;http://evil.example/\x07",  # a link that shows another address
        b"\x1b[>4;2m", b"\x1b[?4m",  # keyboard modes that end in m, as colours do
    ],
)  # fmt: skip
def test_what_a_terminal_acts_on_is_dropped(attack: bytes) -> None:
    assert filtered(b"before" + attack + b"after") == b"beforeafter"
    bytewise = filtered(*(bytes([byte]) for byte in b"before" + attack + b"after"))
    assert bytewise == b"beforeafter"


@pytest.mark.parametrize("attack", ["\x9b2J", "\x9d52;c;eA==\x07", "\x90$qm\x9c", "\x85\x84\x8d"])
def test_c1_controls_are_dropped_and_what_they_began_is_only_text(attack: str) -> None:
    for output in (filtered(attack.encode()), filtered(*(bytes([byte]) for byte in attack.encode()))):
        assert unsafe_left(output) == ""


def test_an_endless_string_is_not_kept_in_memory() -> None:
    safe = TerminalFilter()
    safe.feed(b"\x1b]52;c;")
    for _ in range(200):
        assert safe.feed(b"A" * 10_000) == b""
    assert len(safe._held) < 10_000
    assert safe.feed(b"A\x07done\n") == b"done\n"


def test_an_unfinished_sequence_does_not_swallow_what_follows_a_newline() -> None:
    """A guest that ends in ESC must not be able to join the host's next prompt to a sequence of its own."""
    assert b"\x1b" not in filtered(b"text\x1b", b"[")


_FRAGMENTS = st.sampled_from(
    [b"\x1b", b"[", b"]", b"P", b"_", b"^", b"X", b"\\", b"\x07", b"\x9c", b"\x9b", b"\xc2\x9b", b"\xc2\x9d", b"52;c;?",
     b"31m", b"0", b";", b"?", b">", b"m", b"A", b"t", b" ", b"\n", b"\r", b"text",
     "ü€😀".encode(), b"\xe2\x82", b"\xff", b"\x00", b"$q"]
)  # fmt: skip
_STREAM = st.one_of(st.lists(_FRAGMENTS, max_size=30).map(b"".join), st.binary(max_size=200))


def unsafe_left(output: bytes) -> str:
    text = _COLOUR.sub(b"", output).decode()
    return "".join(char for char in text if not (char in "\n\r\t" or char >= " ") or "\x7f" <= char <= "\x9f")


@given(_STREAM)
def test_nothing_that_acts_gets_through(stream: bytes) -> None:
    assert unsafe_left(filtered(stream)) == ""


@given(_STREAM, st.lists(st.integers(0, 200), max_size=8))
def test_cutting_a_stream_into_pieces_changes_nothing(stream: bytes, cuts: list[int]) -> None:
    places = sorted({0, *(cut for cut in cuts if cut < len(stream)), len(stream)})
    pieces = [stream[a:b] for a, b in itertools.pairwise(places)]
    assert filtered(*pieces) == filtered(stream)
    assert unsafe_left(filtered(*pieces)) == ""


@given(st.text(alphabet=st.characters(exclude_categories=("Cc", "Cs")), max_size=50))
def test_every_text_passes(text: str) -> None:
    assert filtered(text.encode()) == text.encode()
