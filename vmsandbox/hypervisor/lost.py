"""What a libvirtd that was killed, or lost its state, does not clean up: a guest's process and its control groups.

Under systemd a guest's groups are a scope, which goes with its last process. Elsewhere libvirt makes them itself, and
one that was started again does not remove those of a guest that ended in the meantime.
"""

from __future__ import annotations

import os
import re
from contextlib import suppress
from pathlib import Path

from vmsandbox.errors import HostError
from vmsandbox.ledger.processes import processes_of

_GROUPS = Path("/sys/fs/cgroup")


def end_lost(uuid: str) -> bool:
    """End what is left of a guest of which libvirt knows nothing. True if it ran still.

    Raises:
        HostError: its process does not end.
    """
    processes = processes_of(uuid)
    if left := [process for process in processes if not process.end(None)]:
        raise HostError(
            "the guest's process does not end",
            details=f"process {left[0].pid}, UUID {uuid}",
            resolution="`vmsandbox gc` tries again",
        )
    remove_groups(uuid)
    return bool(processes)


def groups_of(uuid: str) -> list[Path]:
    """The control groups that libvirt made for a guest (a domain's name ends in digits of its UUID), in any hierarchy.

    Not found: those of a name so long that libvirt cut it off (64 characters with its own prefix).
    """
    ours = re.compile(rf"qemu-\d+-vmsandbox-.*-(?:{uuid[-6:]}|{uuid[:8]})\.libvirt-qemu")
    return [
        group
        for hierarchy in (_GROUPS, *_folders(_GROUPS))
        for group in _folders(hierarchy / "machine")
        if ours.fullmatch(group.name)
    ]


def remove_groups(uuid: str) -> None:
    """Remove the groups of a guest that has ended. The kernel keeps any in which a process is left."""
    for group in groups_of(uuid):
        for folder in (*_folders(group), group):
            with suppress(OSError):  # libvirt may be at it, too
                folder.rmdir()


def _folders(folder: Path) -> list[Path]:
    with suppress(OSError), os.scandir(folder) as entries:
        return [Path(entry) for entry in entries if entry.is_dir(follow_symlinks=False)]
    return []
