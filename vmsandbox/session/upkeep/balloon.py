"""Takes memory back from a guest while its host is short of it (`resources.memory_reserved`), and gives it again.

Not before: a guest that is kept small without need would drop its caches, and crawl long before it runs out.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from vmsandbox.errors import VmsandboxError

SHORT, ENOUGH = 0.10, 0.20  # of the host's memory that is available
MEMINFO = Path("/proc/meminfo")


def share_available(meminfo: str) -> float:
    """What of a host's memory is available, 0 to 1 (proc(5): MemAvailable, MemTotal). What cannot be read is enough."""
    try:
        values = {line.split(":")[0]: int(line.split()[1]) for line in meminfo.splitlines()}
        return values["MemAvailable"] / values["MemTotal"]
    except (ValueError, IndexError, KeyError, ZeroDivisionError):
        return 1.0


class Balloon:
    """The balloon of one guest. memory_mib: all of its memory. reserved_mib: what it keeps."""

    def __init__(self, uuid: str, memory_mib: int, reserved_mib: int, meminfo: Path = MEMINFO) -> None:
        self._uuid = uuid
        self._all, self._reserved = memory_mib, reserved_mib
        self._now = memory_mib
        self._meminfo = meminfo

    def look(self) -> None:
        """Take, or give back, if that is due; a guest that cannot be asked now is asked again."""
        share = 1.0
        with suppress(OSError):
            share = share_available(self._meminfo.read_text())
        wanted = self._reserved if share < SHORT else self._all if share > ENOUGH else self._now
        if wanted != self._now:
            with suppress(VmsandboxError):
                self._set(wanted)
                self._now = wanted

    def _set(self, mib: int) -> None:
        from vmsandbox.hypervisor.connection import Host

        host = Host.open()
        try:
            host.set_memory(self._uuid, mib)
        finally:
            host.close()
