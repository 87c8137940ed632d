"""What all events have in common: without one base, each kind would decide for itself how it becomes a record."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import ClassVar


@dataclass(frozen=True)
class Event:
    """Base of all events. `kind` is the stable name in the file; the fields are the record's `data`."""

    kind: ClassVar[str] = "event"

    def data(self) -> dict[str, object]:
        """The event's fields as JSON-ready values."""
        return asdict(self)
