"""The policy that is being made of another program's file, and what became of each key of that file.

Without the account a person would believe that a key which has no counterpart here holds all the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vmsandbox.errors import UserInputError
from vmsandbox.policy.importing.shapes import NotUnderstoodError
from vmsandbox.policy.importing.texts import depends, shown

ALWAYS = "holds in every session"


@dataclass(frozen=True)
class Mount:
    """A folder or file of the host in a container. source: as written; target: absolute, normal."""

    at: str
    source: str
    target: str
    read_only: bool


@dataclass(frozen=True)
class Mapped:
    """A key of the file and the key of ours that it became. how: what to know about it."""

    key: str
    to: str
    how: str = ""


@dataclass(frozen=True)
class Left:
    """A key of the file that became nothing, and why."""

    key: str
    why: str


@dataclass
class Draft:
    """Gathers the policy.

    folder          where the policy will lie: its seccomp profiles are named relative to it
    source          the file that is read just now; the fields behind it are of this file alone
    prefix          what its places begin with, when there are several files
    """

    folder: Path
    source: Path = Path()
    prefix: str = ""
    sandbox: dict[str, Any] = field(default_factory=dict)
    mapped: list[Mapped] = field(default_factory=list)
    left: list[Left] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    mounts: list[Mount] = field(default_factory=list)
    dropped: set[str] = field(default_factory=set)
    working_dir: str | None = None
    read_only: str | None = None  # where the file asks for it
    networks: dict[str, Any] = field(default_factory=dict)
    _from: dict[tuple[str, ...], str] = field(default_factory=dict)

    def begin(self, source: Path, prefix: str) -> None:
        """Go on with another file."""
        self.source, self.prefix = source, prefix
        self.mounts, self.working_dir, self.read_only, self.networks = [], None, None, {}

    def leave(self, at: str, why: str) -> None:
        """A key becomes nothing."""
        self.left.append(Left(self.prefix + at, why))

    def always(self, at: str, why: str = ALWAYS) -> None:
        """What a key asks for needs no key of ours."""
        self.mapped.append(Mapped(self.prefix + at, "", why))

    def note(self, at: str, to: str, how: str = "") -> None:
        """A key became a part of one of ours."""
        self._from[(*to.split("."), str(len(self.mapped)))] = self.prefix + at
        self.mapped.append(Mapped(self.prefix + at, to, how))

    def set(self, at: str, to: str, value: Any, how: str = "") -> None:
        """Set one of our keys (`resources.memory`); of two values the stricter stays."""
        section, key = self._section(to)
        before = section.get(key, value)
        if isinstance(before, bool | int | float):
            section[key] = min(before, value)
        elif "read-only" in (before, value):
            section[key] = "read-only"
        elif before == value:
            section[key] = value
        else:
            self.leave(at, f"{to} is set already")
            return
        self.note(at, to, how)

    def add(self, at: str, to: str, value: Any, how: str = "") -> None:
        """Add to one of our lists, once."""
        section, key = self._section(to)
        entries = section.setdefault(key, [])
        if value not in entries:
            entries.append(value)
        self.note(at, to, how)

    def each(self, at: str, value: Any) -> Iterator[tuple[str, str]]:
        """The texts of a list (or the one text), each with its place; those that depend on the host are left."""
        entries = value if isinstance(value, list) else [value]
        for number, one in enumerate(entries):
            place = f"{at}[{number}]" if isinstance(value, list) else at
            if not isinstance(one, str):
                raise NotUnderstoodError(f"not a text: {shown(one)}")
            if depends(one):
                self.leave(place, f"depends on a variable of the host: {shown(one)}")
            else:
                yield place, one

    def checked(self) -> dict[str, Any]:
        """The policy (`{"sandbox": …}`) as the reader of policies takes it.

        What our own limits do not allow (a memory of 16 MiB) is taken out and listed.
        """
        from pydantic import ValidationError

        from vmsandbox.policy.format.model import PolicyFile

        if self.problems:
            raise UserInputError(
                f"this cannot be imported: {self.problems[0]}",
                details="\n".join(self.problems),
                resolution="correct the file",
            )
        while True:
            try:
                PolicyFile.model_validate({"sandbox": self.sandbox})
            except ValidationError as error:
                one = error.errors(include_url=False)[0]
                self._take_out(tuple(str(part) for part in one["loc"][1:]), one["msg"].removeprefix("Value error, "))
            else:
                return {"sandbox": self.sandbox}

    def _take_out(self, where: tuple[str, ...], why: str) -> None:
        """Remove what the validation complains about; the whole list or section if it is not known more exactly."""
        holder: Any = self.sandbox
        section, key = where[0], where[1] if len(where) > 1 else None
        if key is None or key not in holder.get(section, {}):
            taken = [one for one in self._from if one[0] == section]
            del holder[section]
        else:
            taken = [one for one in self._from if one[:2] == (section, key)]
            del holder[section][key]
            if not holder[section]:
                del holder[section]
        for one in taken:
            at = self._from.pop(one)
            self.mapped = [kept for kept in self.mapped if kept.key != at or kept.to != ".".join(one[:2])]
            self.left.append(Left(at, f"not possible here: {why}"))

    def _section(self, to: str) -> tuple[dict[str, Any], str]:
        name, _, key = to.partition(".")
        return self.sandbox.setdefault(name, {}), key
