"""Writes accepted changes into a project: all of them or none, whatever happens meanwhile.

A loop of writes would, when it is killed or the disk is full, leave a project that is neither the old nor the new one,
and would write over what a person saved a second ago. Here everything new is staged beside the project's files,
verified and made durable; the journal says what will be done; then names change, one rename each, in which nothing
is ever replaced: what had the name is saved, looked at again, and only removed when all is done. Whatever goes wrong
before that is undone, here or by `recover` after a crash. (The staging folder and the journal: `apply.record`.)

Who looks *while* it runs may see some names changed and others not; who looks after it, or after `recover`, sees all
or none.

Kept of a file that is replaced: its path, and its owner and group where we may. Not kept, on purpose: hard
links (the other names keep the old bytes), extended attributes, ACLs, capabilities, setuid and setgid bits. As root,
new files get the owner of the folder they come into. Modes are exact, whatever the umask is.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from vmsandbox.apply import kernel
from vmsandbox.apply.folders import Folders, NotAFolderError, names_in, observe, set_mode
from vmsandbox.apply.plan import Conflict, ConflictError, Look, Step, checked, look, parents, steps_for
from vmsandbox.apply.recovery import Recovered, locked, opened, os_errors, recover_all, roll_back
from vmsandbox.apply.stage import stage
from vmsandbox.apply.staging import Staging, is_many, make_durable
from vmsandbox.failpoints import failpoint
from vmsandbox.review.text import shown
from vmsandbox.review.values import Contents, Operation

_MEANWHILE = "it was changed while the changes were being applied"
_OPEN_SAVED = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


@dataclass(frozen=True)
class Applied:
    """What an apply did.

    paths: what was written or removed. already: what was as it should be before. kept: folders that were to be
    deleted and stay, because they hold something that was not pushed. recovered: what earlier, unfinished applies
    had left. leftover: the staging folder's name, if it could not be removed (the next `recover` tries again).
    """

    paths: tuple[str, ...] = ()
    already: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()
    recovered: tuple[Recovered, ...] = ()
    leftover: str | None = None


def check(root: Path, operations: Sequence[Operation]) -> list[Conflict]:
    """What in the project is not (any more) as the operations expect it; empty if they could be applied now.

    Writes nothing and takes no lock.

    Raises:
        RefusedError: an operation names what is never written to, or asks for more than permission bits.
        HostError: something cannot be read.
    """
    wanted = checked(operations)
    with os_errors(), opened(root) as root_fd, Folders(root_fd) as folders:
        return look(folders, wanted).conflicts


def apply(
    root: Path, operations: Sequence[Operation], contents: Contents, *, label: str, wait: float = 10.0
) -> Applied:
    """Do all operations, or none.

    Args:
        root: the project's folder.
        operations: in any order; a folder that is new needs an operation of its own.
        contents: the bytes of new files. Their digests are checked while they are copied.
        label: who did it (a session's id), for the message if it has to be recovered.
        wait: seconds to wait for another apply to the same project.

    Raises:
        ConflictError: the project is not as the operations expect it. Nothing was changed.
        RefusedError: an operation names what is never written to. Nothing was changed.
        HostError: the disk is full, read-only, broken; bytes are missing. Nothing was changed.
        UnfinishedError: it failed, and so did undoing it: `recover` has to be called again.
        UserInputError: another apply is at work.
    """
    wanted = checked(operations)
    with locked(root, wait) as root_fd:
        recovered = recover_all(root, root_fd)
        with os_errors(), Folders(root_fd) as folders:
            found = look(folders, wanted)
            if found.conflicts:
                raise ConflictError(found.conflicts)
            if not steps_for(wanted, found):
                return Applied((), tuple(sorted(found.already)), tuple(sorted(found.kept)), recovered)
            with Staging.create(root_fd) as staging:
                done = _Transaction(folders, staging, wanted, found).run(contents, label)
    return Applied(done.paths, done.already, done.kept, recovered, done.leftover)


class _Transaction:
    """One apply in progress, after the first look."""

    def __init__(self, folders: Folders, staging: Staging, operations: Sequence[Operation], first: Look) -> None:
        self._folders = folders
        self._staging = staging
        self._operations = operations
        self._first = first
        self._steps: list[Step] = []
        self._saved: dict[int, int] = {}  # number of an operation: where what it took away is

    def run(self, contents: Contents, label: str) -> Applied:
        """All of it; undoes what was done and raises if anything fails."""
        try:
            failpoint("apply.staging-made")
            self._prepare(contents)
            self._staging.begin(label, self._steps)
            failpoint("apply.begun")
            for step in self._steps:
                self._do(step)
                failpoint("apply.step")
            self._verify()
            failpoint("apply.verified")
            make_durable(self._folders, self._staging, self._steps)
            failpoint("apply.durable")
            self._staging.mark("journal", "done")
        except BaseException:
            roll_back(self._folders, self._staging, self._steps)
            raise
        leftover = None
        try:
            failpoint("apply.done")
            self._staging.remove()
        except OSError:
            leftover = self._staging.name
        already, kept = sorted(self._first.already), sorted(self._first.kept)
        return Applied(tuple(sorted({step.path for step in self._steps})), tuple(already), tuple(kept), (), leftover)

    def _prepare(self, contents: Contents) -> None:
        """Stage all that is new, make it durable, and look at the project once more."""
        planned = steps_for(self._operations, self._first)
        stage(self._folders, self._staging, planned, contents)
        failpoint("apply.staged")
        if is_many(len(planned)):
            kernel.sync_file_system(self._staging.root_fd)
        else:
            os.fsync(self._staging.new)  # `stage` has synced each file
        failpoint("apply.staged-durable")
        again = look(self._folders, self._operations)
        if again.conflicts:
            raise ConflictError(again.conflicts)
        self._steps = steps_for(self._operations, again)
        differing = {(one.path, one.act) for one in planned} ^ {(one.path, one.act) for one in self._steps}
        if differing:
            raise ConflictError([Conflict(path, "modified", _MEANWHILE) for path, _ in sorted(differing)])

    def _do(self, step: Step) -> None:
        """One step: one rename (two, where names cannot be exchanged), or one chmod."""
        number = str(step.number)
        staging = self._staging
        try:
            if step.act == "mode" and step.after is not None and step.after.kind == "dir":
                self._folders.fd(step.path)  # stays open, so that undoing finds it wherever it is moved
            folder, name = self._folders.parent(step.path)  # last: valid until the next one is opened
            if step.act == "mode":
                assert step.after is not None
                special = step.was & 0o7000 if step.after.kind == "dir" else 0
                set_mode(folder, name, special | step.after.mode)
            elif step.act == "in":
                kernel.put(staging.new, number, folder, name)
            elif step.act == "swap" and kernel.exchange(staging.new, number, folder, name):
                self._saved[step.number] = staging.new
            else:
                os.rename(name, number, src_dir_fd=folder, dst_dir_fd=staging.old)
                self._saved[step.number] = staging.old
                if step.act == "swap":
                    failpoint("apply.half-swapped")
                    kernel.put(staging.new, number, folder, name)
        except NotAFolderError as problem:
            text = f"{shown(problem.path)}: {problem.why}"
            raise ConflictError([Conflict(step.path, "no folder", text)]) from None
        except OSError as error:
            if error.errno in (errno.EEXIST, errno.ENOTEMPTY):
                raise ConflictError([Conflict(step.path, "appeared", _MEANWHILE)]) from None
            if error.errno == errno.ENOENT:
                raise ConflictError([Conflict(step.path, "deleted", _MEANWHILE)]) from None
            raise

    def _verify(self) -> None:
        """Look at what was taken away, now that nobody can reach it any more, and whether all lies in the project.

        Raises:
            ConflictError: somebody was quicker than the second look.
        """
        conflicts = []
        for step in self._steps:
            if step.act == "mode":
                with suppress(NotAFolderError):  # found below
                    if observe(*self._folders.parent(step.path), (step.after,)) != step.after:
                        conflicts.append(Conflict(step.path, "modified", _MEANWHILE))
            elif step.number in self._saved:
                conflicts += self._verify_saved(step, self._saved[step.number])
        with Folders(self._staging.root_fd) as afresh:
            gone = {one.path for one in self._steps if one.before and one.before.kind == "dir" and one.act != "mode"}
            for path in sorted(parents(self._steps) - gone):
                try:
                    afresh.fd(path)
                except NotAFolderError as problem:
                    conflicts.append(Conflict(path, "no folder", f"{shown(problem.path)}: {problem.why}"))
                    continue
                if path and afresh.identities[path] != self._folders.identities[path]:
                    conflicts.append(Conflict(path, "no folder", "it was replaced by another folder meanwhile"))
        if conflicts:
            raise ConflictError(conflicts)

    def _verify_saved(self, step: Step, part: int) -> Iterator[Conflict]:
        number = str(step.number)
        if step.before is not None and step.before.kind in ("file", "dir"):
            try:
                fd = os.open(number, _OPEN_SAVED, dir_fd=part)
            except OSError as error:
                if error.errno != errno.ELOOP:
                    raise
                fd = -1  # a link: found below
            if fd >= 0:
                try:
                    if stat.S_ISDIR(os.fstat(fd).st_mode):
                        if names_in(fd):
                            yield Conflict(step.path, "not empty", "something was put into the folder meanwhile")
                    elif kernel.is_open_for_writing(fd):
                        # Before reading it: who has it open could write after that, into a file that we remove.
                        yield Conflict(step.path, "in use", "another program has it open for writing")
                finally:
                    os.close(fd)
        if observe(part, number, (step.before,)) != step.before:
            yield Conflict(step.path, "modified", _MEANWHILE)
