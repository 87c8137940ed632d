"""Which process is meant: by number, start time and boot, because numbers are used again and hosts are restarted."""

from __future__ import annotations

import os
import select
import signal
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path


@dataclass(frozen=True)
class Process:
    """One process, for good. started: clock ticks since boot (0: it was gone when it was looked at)."""

    pid: int
    started: int
    boot: str

    @classmethod
    def of(cls, pid: int) -> Process:
        """The process that has this number now."""
        return cls(pid, process_started(pid) or 0, boot_id())

    @classmethod
    def here(cls) -> Process:
        """This process."""
        return cls.of(os.getpid())

    @classmethod
    def parse(cls, text: str) -> Process:
        """What `str` gave. Raises ValueError."""
        pid, started, boot = text.split(":")
        return cls(int(pid), int(started), boot)

    def __str__(self) -> str:
        return f"{self.pid}:{self.started}:{self.boot}"

    @property
    def is_alive(self) -> bool:
        """Whether it still runs; a zombie does not."""
        return self.boot == boot_id() and self.started > 0 and process_started(self.pid) == self.started

    def end(self, patience: float | None = 8.0) -> bool:
        """Ask it to end, then kill it; whether it is gone. patience: seconds until it is killed; None: not asked."""
        try:
            descriptor = os.pidfd_open(self.pid)
        except OSError:
            return True
        try:
            # Looked at after the descriptor is held: the number cannot mean another process from here on.
            if not self.is_alive:
                return True
            poller = select.poll()
            poller.register(descriptor, select.POLLIN)
            asked = [] if patience is None else [(signal.SIGTERM, patience)]
            for number, seconds in (*asked, (signal.SIGKILL, 5.0)):
                with suppress(ProcessLookupError):
                    signal.pidfd_send_signal(descriptor, number)
                if poller.poll(seconds * 1000):
                    return True
        finally:
            os.close(descriptor)
        return False


@cache
def boot_id() -> str:
    """The kernel's name for this boot of the host (random(4))."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def process_started(pid: int) -> int | None:
    """A process's start time in clock ticks since boot (field 22 of /proc/PID/stat), None if it is gone."""
    with suppress(OSError, ValueError, IndexError):
        stat = Path(f"/proc/{pid}/stat").read_text()
        fields = stat.rpartition(")")[2].split()
        return None if fields[0] in "ZX" else int(fields[19])
    return None


def processes_of(uuid: str) -> list[Process]:
    """The QEMU processes of a guest, by the UUID on their command lines."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        with suppress(OSError):
            process = Process.of(int(entry.name))
            words = (entry / "cmdline").read_bytes().split(b"\0")
            if b"qemu" in os.path.basename(words[0]) and uuid.encode() in words:  # noqa: PTH119 - bytes
                found.append(process)
    return found


def private_memory(pid: int) -> int:
    """Bytes of memory that a process has for itself alone (RssAnon of proc(5)); 0 if it is gone.

    Of memory that forks share, these are the pages that this one has written.
    """
    with suppress(OSError, ValueError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    return 0
