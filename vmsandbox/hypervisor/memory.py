"""Where a fork's memory comes from, so that forks share what they only read and none can write what another reads.

Three ways, the best that this host allows:

readonly  QEMU 8.2 and newer maps the template's file privately through a read-only descriptor.
sealed    Older QEMU insists on opening the file for writing, and its balloon punches holes into it even when the
          mapping is private, so a guest could blank memory that the next fork starts from. A memfd with
          F_SEAL_WRITE may be opened for writing, but nobody can change it again, not even with the descriptor.
          It lives as long as one guest has it open; the next fork finds it there by its inode number.
copied    Where QEMU may only open files that a MAC profile names (AppArmor, SELinux), and for a guest with a balloon
          (of a file that it shares, or may not write, QEMU gives nothing back): a copy for each session.
"""

from __future__ import annotations

import fcntl
import json
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from vmsandbox.errors import HostError
from vmsandbox.hypervisor.connection import Host
from vmsandbox.hypervisor.files import fill_sparse, new_sparse
from vmsandbox.hypervisor.launch import Machine, disk_errors, give
from vmsandbox.hypervisor.template import Template
from vmsandbox.process import Programs

RECORD = "memory.json"
_SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE


@dataclass(frozen=True)
class ForkMemory:
    """The file that QEMU maps. `wait` returns when its content is complete (raises what went wrong)."""

    path: Path
    readonly: bool
    wait: Callable[[], None]


@contextmanager
def fork_memory(
    host: Host,
    machine: Machine,
    template: Template,
    folder: Path,
    live: Path,
    user: tuple[int, int] | None,
    programs: Programs,
    *,
    own: bool = False,
) -> Iterator[ForkMemory]:
    """Provide a fork's memory until QEMU has opened it.

    Args:
        folder: the session's own folder for QEMU's files.
        live: the folder of all live sessions, where a sealed memory is looked for.
        user: the QEMU user of this session.
        own: share nothing.

    Raises:
        HostError: no room for the memory.
    """
    with ExitStack() as stack:
        if own or (host.confined_by_mac and not machine.opens_memory_readonly):
            yield _copied(template, folder, user, stack)
        elif machine.opens_memory_readonly:
            yield ForkMemory(template.ram, True, lambda: None)
        else:
            yield _sealed(template, folder, live, user, programs, stack)


def _copied(template: Template, folder: Path, user: tuple[int, int] | None, stack: ExitStack) -> ForkMemory:
    path = folder / "ram"
    with disk_errors("making the session's memory file"):
        new_sparse(path, template.ram.stat().st_size)
        give(path, user)
    filling = _Background(lambda: fill_sparse(template.ram, path))
    stack.callback(filling.finish)
    return ForkMemory(path, False, filling.wait)


def _sealed(
    template: Template,
    folder: Path,
    live: Path,
    user: tuple[int, int] | None,
    programs: Programs,
    stack: ExitStack,
) -> ForkMemory:
    lock = os.open(template.folder.parent / f".{template.key}.memory", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    stack.callback(os.close, lock)
    fcntl.flock(lock, fcntl.LOCK_EX)
    fd = _find_sealed(template, live)
    filling: _Background | None = None
    if fd is None:
        fd = os.memfd_create("vmsandbox", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        stack.callback(os.close, fd)  # before the filling: it is closed only when that has ended
        os.ftruncate(fd, template.ram.stat().st_size)
        sealed_fd = fd
        # The lock is kept until it is sealed: forks started at the same moment wait a tenth of a second and share it.
        filling = _Background(lambda: _fill_and_seal(template.ram, sealed_fd, lock))
        stack.callback(filling.finish)
    else:
        stack.callback(os.close, fd)
        fcntl.flock(lock, fcntl.LOCK_UN)
    info = os.fstat(fd)
    record = {"template": template.key, "pid": os.getpid(), "device": info.st_dev, "inode": info.st_ino}
    (folder.parent / RECORD).write_text(json.dumps(record))
    # QEMU opens it through /proc, which only a process of its own user allows.
    keeper = stack.enter_context(programs.holding(fd, user)) if user is not None else os.getpid()
    return ForkMemory(Path(f"/proc/{keeper}/fd/{fd}"), False, filling.wait if filling else lambda: None)


def _fill_and_seal(source: Path, fd: int, lock: int) -> None:
    try:
        fill_sparse(source, Path(f"/proc/self/fd/{fd}"), follow=True)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
    finally:
        fcntl.flock(lock, fcntl.LOCK_UN)


def _find_sealed(template: Template, live: Path) -> int | None:
    """A descriptor of this template's sealed memory, if a guest (or the process starting one) has it open.

    Only an inode that a record of ours names is taken: a QEMU that was taken over could offer another file.
    """
    for record_path in live.glob(f"*/{RECORD}"):
        with suppress(OSError, ValueError, KeyError, TypeError):  # a record that is damaged is passed over
            record = json.loads(record_path.read_text())
            if record["template"] != template.key:
                continue
            pids = [record["pid"]]
            for pid_file in record_path.parent.glob("qemu-*.pid"):
                with suppress(OSError, ValueError):
                    pids.append(int(pid_file.read_text()))
            for pid in pids:
                if (fd := _open_inode(pid, record["device"], record["inode"])) is not None:
                    return fd
    return None


def _open_inode(pid: int, device: int, inode: int) -> int | None:
    with suppress(OSError):
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(OSError):
                info = entry.stat()
                if (info.st_dev, info.st_ino) != (device, inode):
                    continue
                fd = os.open(entry, os.O_RDWR | os.O_CLOEXEC)
                again = os.fstat(fd)
                sealed = fcntl.fcntl(fd, fcntl.F_GET_SEALS) & _SEALS == _SEALS
                if sealed and (again.st_dev, again.st_ino) == (device, inode):
                    return fd
                os.close(fd)
    return None


class _Background:
    """Fills the memory while libvirt starts QEMU, which maps the file but reads it only when it loads a state."""

    def __init__(self, work: Callable[[], None]) -> None:
        self._error: BaseException | None = None
        self._work = work
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._work()
        except BaseException as error:
            self._error = error

    def finish(self) -> None:
        self._thread.join()

    def wait(self) -> None:
        self._thread.join()
        if isinstance(self._error, OSError):
            raise HostError(
                "the template's memory could not be copied",
                details=str(self._error),
                resolution="free memory or disk space; `vmsandbox doctor` shows what there is",
            ) from self._error
        if self._error is not None:
            raise self._error
