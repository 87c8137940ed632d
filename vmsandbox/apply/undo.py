"""Takes the steps of an unfinished apply back, one by one, whatever it was that stopped it.

Nothing tells how many of the steps were done; what lies where tells it. Undoing twice is undoing once, so this may be
killed too. What is neither the old nor the new thing is somebody's newer work: it stays, beside if it must, and is
reported.
"""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from vmsandbox.apply import kernel
from vmsandbox.apply.folders import Folders, NotAFolderError, names_in, observe, set_mode
from vmsandbox.apply.plan import Step
from vmsandbox.apply.staging import Staging
from vmsandbox.failpoints import failpoint
from vmsandbox.review.manifest import Item
from vmsandbox.review.text import shown


@dataclass
class Undone:
    """What could not be put back silently.

    newer: paths of somebody's newer work that was left where it is or moved beside. stuck: what could not be
    undone, and why; the staging folder has to stay then.
    """

    newer: list[str] = field(default_factory=list)
    stuck: list[str] = field(default_factory=list)


def undo(folders: Folders, staging: Staging, steps: Sequence[Step]) -> Undone:
    """Undo all steps, the last one first.

    Raises:
        OSError: one cannot be undone now (a broken or read-only disk). Call it again later.
    """
    undoing = _Undoing(folders, staging)
    folders.take_what_is_there = True
    for step in reversed(steps):
        failpoint("undo.step")
        try:
            undoing.step(step)
        except NotAFolderError as problem:
            if undoing.saves(step) and problem.missing:
                folders.make(step.path.rpartition("/")[0])  # somebody removed the folder; what was in it comes back
                undoing.step(step)
            elif undoing.saves(step) or (undoing.has_come(step) and not problem.missing):
                undoing.result.stuck.append(f"{shown(step.path)}: {shown(problem.path)}: {problem.why}")
    return undoing.result


class _Undoing:
    """One undo in progress."""

    def __init__(self, folders: Folders, staging: Staging) -> None:
        self._folders = folders
        self._staging = staging
        self.result = Undone()

    def saves(self, step: Step) -> bool:
        """Whether the staging folder holds what this step took away."""
        if step.act == "out":
            return self._in(self._staging.old, step) is not None
        if step.act == "swap":
            held = self._in(self._staging.new, step)
            return self._in(self._staging.old, step) is not None or (held is not None and not self._is_new(held, step))
        return False

    def has_come(self, step: Step) -> bool:
        """Whether something new was put in place and is there still (an empty folder does not count)."""
        if step.act != "in" or (step.after is not None and step.after.kind == "dir"):
            return False
        try:
            # Two links: halfway, see `kernel.put`.
            return os.stat(str(step.number), dir_fd=self._staging.new, follow_symlinks=False).st_nlink > 1
        except FileNotFoundError:
            return True

    def step(self, step: Step) -> None:
        """Undo one step, if it was done. Raises NotAFolderError if its folder cannot be reached."""
        folder, name = self._folders.parent(step.path)
        if step.act == "mode":
            self._mode(step, folder, name)
        elif step.act == "in":
            self._take_away(step, folder, name)
        elif step.act == "out":
            if self._in(self._staging.old, step) is not None:
                self._put_back(step, self._staging.old, folder, name)
        elif self._in(self._staging.old, step) is not None:  # a swap in two steps
            self._put_back(step, self._staging.old, folder, name)
        elif self.saves(step):
            there = observe(folder, name, (step.after,))
            ours = there is not None and self._is_new(there, step)
            if ours and there and there.kind == "dir":
                ours = not self._listing(folder, name)
            if not (ours and kernel.exchange(folder, name, self._staging.new, str(step.number))):
                self._put_back(step, self._staging.new, folder, name)

    def _in(self, part: int, step: Step) -> Item | None:
        return observe(part, str(step.number), (step.after,)) if part >= 0 else None

    def _is_new(self, found: Item, step: Step) -> bool:
        """Whether this is what the step puts in place."""
        if step.after is not None and step.after.kind == "dir":
            # Its mode may be on the way to the final one. What it replaced was no folder.
            return found.kind == "dir"
        return found == step.after

    def _mode(self, step: Step, folder: int, name: str) -> None:
        assert step.after is not None
        held = self._in(self._staging.new, step)
        if held is not None and held.kind == "dir":
            return  # the folder was not put in place: the one that is there is not ours
        if step.after.kind == "dir":
            # By its descriptor: who moved it away may have taken our mode along.
            with suppress(PermissionError):
                fd = self._folders.fd(step.path)
                if stat.S_IMODE(os.fstat(fd).st_mode) & 0o777 == step.after.mode:
                    os.fchmod(fd, step.was)
                return
        there = observe(folder, name, ())
        if there is not None and there.kind == step.after.kind and there.mode == step.after.mode:
            set_mode(folder, name, step.was)

    def _take_away(self, step: Step, folder: int, name: str) -> None:
        """Undo the coming of something new."""
        there = observe(folder, name, (step.after,))
        if there is None:
            return
        number = str(step.number)
        if self._in(self._staging.new, step) is not None:
            # Not put in place, or halfway: link(2) was done and unlink(2) was not. Otherwise it is not ours.
            one = os.stat(number, dir_fd=self._staging.new, follow_symlinks=False)
            other = os.stat(name, dir_fd=folder, follow_symlinks=False)
            if os.path.samestat(one, other):
                os.unlink(name, dir_fd=folder)
        elif not self._is_new(there, step):
            self.result.newer.append(step.path)
        elif there.kind == "dir":
            try:
                os.rmdir(name, dir_fd=folder)
            except OSError:
                if not self._listing(folder, name):
                    raise
                self.result.newer.append(step.path)
        else:
            kernel.put(folder, name, self._staging.new, number)

    def _listing(self, folder: int, name: str) -> list[str]:
        fd = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
        try:
            return names_in(fd)
        finally:
            os.close(fd)

    def _put_back(self, step: Step, part: int, folder: int, name: str) -> None:
        """Put what was taken out back under its name; what has that name now gives way."""
        number = str(step.number)
        there = observe(folder, name, (step.before, step.after))
        if there is not None:
            one = os.stat(number, dir_fd=part, follow_symlinks=False)
            if os.path.samestat(one, os.stat(name, dir_fd=folder, follow_symlinks=False)):
                os.unlink(number, dir_fd=part)  # link(2) was done and unlink(2) was not
                return
            if there.kind == "dir" and stat.S_ISDIR(one.st_mode):
                self.result.newer.append(step.path)  # somebody made the folder anew: what is in it stays in it
                os.rmdir(number, dir_fd=part)
                return
            if step.after is not None and self._is_new(there, step) and there.kind != "dir":
                os.unlink(name, dir_fd=folder)  # ours; its bytes are in quarantine
            elif step.after is not None and there.kind == "dir" and not self._listing(folder, name):
                os.rmdir(name, dir_fd=folder)
            else:
                self._move_beside(step, folder, name)
        failpoint("undo.put-back")
        kernel.put(part, number, folder, name)

    def _move_beside(self, step: Step, folder: int, name: str) -> None:
        mark = f".vmsandbox-kept-{secrets.token_hex(4)}"
        stem = os.fsencode(name)[: 255 - len(mark)].decode("utf-8", "surrogateescape")
        kernel.put(folder, name, folder, stem + mark)
        self.result.newer.append("/".join([*step.path.split("/")[:-1], stem + mark]))
