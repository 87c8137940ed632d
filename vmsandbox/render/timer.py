"""systemd's units for a session that is repeated (systemd.service(5), systemd.timer(5)). Pure."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

_PLAIN = re.compile(r"[A-Za-z0-9_@+=:,./-]+")
_ESCAPES = {"\\": r"\\", '"': r"\"", "\n": r"\n", "\t": r"\t", "\r": r"\r", "%": "%%", "$": "$$"}


@dataclass(frozen=True)
class TimerPlan:
    """A session and when it is started.

    name         of both units, without their endings
    description  for people
    schedule     a calendar expression (systemd.time(7))
    command      its words; the first is a program's path
    environment  variables that the command gets beside systemd's own
    user         whose session it is, for units of the system; None for units of a user
    """

    name: str
    description: str
    schedule: str
    command: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)
    user: str | None = None


def render_units(plan: TimerPlan) -> dict[str, str]:
    """File name → text of the service and of its timer."""
    service = [
        "[Unit]",
        f"Description={_text(plan.description)}",
        "",
        "[Service]",
        "Type=oneshot",
        *([f"User={plan.user}"] if plan.user else []),
        *(f"Environment={_word(f'{name}={value}')}" for name, value in sorted(plan.environment.items())),
        f"ExecStart={' '.join(_word(word, command=True) for word in plan.command)}",
        "# an end by systemd reaches the session, which ends its guest, and not its helpers first",
        "KillMode=mixed",
        "TimeoutStopSec=60",
    ]
    timer = [
        "[Unit]",
        f"Description={_text(plan.description)}",
        "",
        "[Timer]",
        f"OnCalendar={plan.schedule}",
        "# what was missed while the host was off is made up for",
        "Persistent=true",
        "",
        "[Install]",
        "WantedBy=timers.target",
    ]
    texts = {f"{plan.name}.service": service, f"{plan.name}.timer": timer}
    return {name: "\n".join((*lines, "")) for name, lines in texts.items()}


def _word(word: str, *, command: bool = False) -> str:
    """One word as systemd reads it back: quoted, no specifiers, no variables (which only a command line has)."""
    if _PLAIN.fullmatch(word):
        return word
    escapes = _ESCAPES if command else {**_ESCAPES, "$": "$"}
    return '"' + "".join(_escaped(character, escapes) for character in word) + '"'


def _escaped(character: str, escapes: Mapping[str, str]) -> str:
    if character in escapes:
        return escapes[character]
    return character if character.isprintable() else "".join(f"\\x{byte:02x}" for byte in os.fsencode(character))


def _text(text: str) -> str:
    return "".join(character if character.isprintable() else "?" for character in text).replace("%", "%%")
