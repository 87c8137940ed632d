"""Keeps a hostile guest's output from driving the host's terminal.

Outside an explicit raw shell, only text, line ends, tabs and colours (SGR) pass. Everything else that a terminal
acts on is dropped: window titles, the clipboard (OSC 52), queries whose answers would arrive as typed input
(DECRQSS, DA, DSR), cursor movement that could repaint the host's own prompt.
"""

from __future__ import annotations

import codecs
import re

_SGR = re.compile(r"\x1b\[[0-9;:]{0,64}m")
# A sequence that is complete, or one that the next piece of output may complete.
_SEQUENCE = re.compile(
    r"\x1b\[[0-?]*[ -/]*(?:[@-~]|$)"  # CSI
    r"|\x1b[\]PX^_][^\x07\x1b\x9c]*(?:\x07|\x1b\\|\x9c|\x1b?$|(?=\x1b[^\\]))"  # OSC, DCS, SOS, PM, APC
    r"|\x1b[ -/]*(?:[0-~]|$)"  # two-character escapes
    r"|[\x80-\x9f]"  # C1 controls, also as CSI or OSC
)
_OTHER_CONTROLS = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
_LONGEST = 4096  # characters of an unfinished sequence that are waited for


class TerminalFilter:
    """Filters one stream; pieces may be cut anywhere, also inside a character or a sequence."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""

    def feed(self, untrusted: bytes) -> bytes:
        """What of this piece (and of what was held back before) may reach a terminal."""
        text = self._held + self._decoder.decode(untrusted)
        self._held = ""
        out: list[str] = []
        position = 0
        for match in _SEQUENCE.finditer(text):
            out.append(_plain(text[position : match.start()]))
            position = match.end()
            sequence = match.group()
            if match.end() == len(text) and _is_unfinished(sequence):
                if len(sequence) <= _LONGEST:
                    self._held = sequence
                elif sequence[1:2] in "]PX^_":
                    self._held = sequence[:2]  # still inside the string: its content is dropped as it comes
                continue
            if _SGR.fullmatch(sequence):
                out.append(sequence)
        out.append(_plain(text[position:]))
        return "".join(out).encode()


def _is_unfinished(sequence: str) -> bool:
    if sequence == "\x1b":
        return True
    if sequence.startswith("\x1b["):
        return not ("@" <= sequence[-1] <= "~" and len(sequence) > 2)
    if sequence[1:2] in "]PX^_" and sequence[0] == "\x1b":
        return not sequence.endswith(("\x07", "\x1b\\", "\x9c"))
    return sequence[0] == "\x1b" and not ("0" <= sequence[-1] <= "~")


def _plain(text: str) -> str:
    return _OTHER_CONTROLS.sub("", text)
