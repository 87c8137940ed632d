"""The checks that `vmsandbox doctor` is made of, one module per subject.

A check looks and reports; it changes nothing. What would mend it is text for people (`remedy`), Debian
packages (`packages`), or a function (`fix`) that the doctor calls only when it was asked to.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from vmsandbox.paths import Layout
from vmsandbox.process import Programs


class Status(StrEnum):
    """`fail` means that no session could run because of this; `warn` that something is missing or worse."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True)
class CheckResult:
    """One check's outcome.

    id        stable name, for scripts
    found     what is there now
    remedy    what a person can do about it; commands as they are typed
    packages  Debian packages that would mend it
    fix       does the safe part of the remedy and returns what it did, in words; None if there is none
    """

    id: str
    title: str
    status: Status
    found: str
    remedy: str = ""
    packages: tuple[str, ...] = ()
    fix: Callable[[], str] | None = field(default=None, repr=False, compare=False)


@dataclass(frozen=True)
class Examined:
    """The host that is examined. `root` is `/`; a test has a folder that looks like a host."""

    layout: Layout
    programs: Programs
    uri: str
    allow_emulation: bool = False
    uid: int = field(default_factory=os.geteuid)
    root: Path = Path("/")
    kernel: str = field(default_factory=platform.release)

    @property
    def is_root(self) -> bool:
        """Whether the checks run as root, and so may mend."""
        return self.uid == 0

    @property
    def is_system(self) -> bool:
        """Whether guests are run by the system's libvirt daemon."""
        return self.uri == "qemu:///system"

    @property
    def has_systemd(self) -> bool:
        """sd_booted(3)."""
        return self.path("/run/systemd/system").is_dir()

    def path(self, absolute: str | Path) -> Path:
        """An absolute path of the host, below `root`."""
        return self.root / str(absolute).lstrip("/")

    def read(self, absolute: str | Path) -> str | None:
        """A small file's text without surrounding white space, or None."""
        try:
            return self.path(absolute).read_text(errors="replace").strip()
        except OSError:
            return None


def install_line(packages: tuple[str, ...]) -> str:
    """The command that installs Debian packages."""
    return f"sudo apt-get install --no-install-recommends {' '.join(packages)}"
