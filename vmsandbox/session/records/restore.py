"""Brings a backed-up project back, into a folder that is new or empty.

On purpose no `git clone` and no checkout: what the project's own `.gitattributes` names would run, and a tree that
someone else committed could write through a link or into `.git`. Blobs are read raw, checked against their ids, and
written by us: all files before the first link, nothing over what is there, and the whole appears by one rename.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from vmsandbox.errors import GuestError, HostError, UserInputError
from vmsandbox.git.names import is_git_folder
from vmsandbox.git.objects import EXECUTABLE, GITLINK, LINK, object_id
from vmsandbox.git.quarantine import make_bare
from vmsandbox.policy.tree.gitrun import HostGit
from vmsandbox.process import Programs
from vmsandbox.review.manifest import Item, Manifest, checked_path, parse_untrusted_manifest
from vmsandbox.review.text import shown
from vmsandbox.session.records.backup import FOLDER, Backup, read_backup, sha256_of

_PIECE = 16 << 20  # bytes of blobs that are in memory at once
_MAX_DEPTH = 256


@dataclass(frozen=True)
class Restored:
    """What came back. left_out: paths of the commit that no folder may have (`.git/…`), safe to show."""

    project: str
    target: str
    files: int
    left_out: tuple[str, ...] = ()


def restore(record: Path, target: Path, programs: Programs | None = None) -> Restored:
    """Bring the backup in a session's record back, with its repository if it was the top of one.

    Raises:
        UserInputError: there is no backup, or `target` is neither new nor an empty folder.
        HostError: a digest is not what it was, or it cannot be written. Nothing is left at `target` then.
    """
    backup = read_backup(record)
    target = target.absolute()
    try:
        if target.is_symlink() or (target.exists() and (not target.is_dir() or any(target.iterdir()))):
            raise UserInputError(f"not an empty folder: {target}", resolution="name a folder that does not exist yet")
        staged = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise UserInputError(f"cannot be written: {target}", details=str(error)) from error
    try:
        restored = _Restoring(record / FOLDER, backup, staged, programs or Programs()).run(target)
        staged.chmod(0o755)
        staged.rename(target)
    except OSError as error:
        raise HostError("the backup could not be brought back", details=str(error)) from error
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    return restored


class _Restoring:
    def __init__(self, folder: Path, backup: Backup, staged: Path, programs: Programs) -> None:
        self._folder = folder
        self._backup = backup
        self._staged = staged
        self._programs = programs
        self._left_out: list[str] = []
        self._links: list[tuple[Path, bytes]] = []

    def run(self, target: Path) -> Restored:
        """Write everything into the staged folder."""
        work = self._work()
        with ExitStack() as stack:
            if self._backup.bundle is not None:
                git_dir = self._staged / ".git"
                if self._backup.prefix:  # a folder of a repository: its files alone
                    git_dir = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=self._folder))) / "git"
                self._write_commit(self._repository(git_dir), work)
        self._write_work(work)
        for path, link in self._links:  # on purpose last: nothing is written through one
            path.symlink_to(os.fsdecode(link))
        for name, item in sorted(work.items.items(), reverse=True):
            if item.kind == "dir":
                (self._staged / name).chmod(item.mode)
        files = sum(len(names) for folder, _, names in os.walk(self._staged) if "/.git" not in folder)
        return Restored(self._backup.project, os.fspath(target), files, tuple(self._left_out))

    def _work(self) -> Manifest:
        for name, digest in (("work.tar", self._backup.work), ("all.bundle", self._backup.bundle)):
            if digest is not None and sha256_of(self._folder / name) != digest:
                raise HostError(f"the backup is damaged: {name} is not what was written", details=str(self._folder))
        try:
            return parse_untrusted_manifest([(self._folder / "work.jsonl").read_bytes()])
        except GuestError as error:  # its reader thinks of guests; this list is our own
            raise HostError("the backup is damaged: its list of files", details=error.details) from error

    def _repository(self, git_dir: Path) -> HostGit:
        """The repository anew from the bundle, with all refs; its configuration and hooks are not brought back."""
        backup = self._backup
        make_bare(git_dir, backup.algorithm)
        config = (git_dir / "config").read_text()
        (git_dir / "config").write_text(config.replace("bare = true", "bare = false"))
        if (self._folder / "shallow").exists():
            shutil.copyfile(self._folder / "shallow", git_dir / "shallow")
        git = HostGit(self._programs, git_dir)
        heads = git.run("bundle", "unbundle", self._folder / "all.bundle", timeout=1800).stdout
        rows = (row.partition(b" ") for row in heads.splitlines())
        commands = b"".join(b"create %s\0%s\0" % (ref, oid) for oid, _, ref in rows if ref.startswith(b"refs/"))
        git.run("update-ref", "--no-deref", "--stdin", "-z", stdin=commands)
        if backup.head_ref is not None:
            (git_dir / "HEAD").write_bytes(b"ref: " + os.fsencode(backup.head_ref) + b"\n")
        elif backup.head is not None:
            (git_dir / "HEAD").write_text(backup.head + "\n")
        return git

    def _write_commit(self, git: HostGit, work: Manifest) -> None:
        backup = self._backup
        if backup.head is None:
            return
        gone = set(backup.deleted)
        wanted: list[tuple[str, int, str, int]] = []
        listing = git.run("ls-tree", "-r", "-z", "-l", "--full-tree", f"{backup.head}:{backup.prefix}", timeout=300)
        for row in os.fsdecode(listing.stdout).split("\0")[:-1]:
            facts, _, path = row.partition("\t")
            mode, _kind, oid, length = facts.split()
            if path in gone or path in work.items:
                continue
            if not self._may_be_written(path):
                self._left_out.append(shown(path, 200))
            elif int(mode, 8) == GITLINK:
                self._place(path).mkdir(exist_ok=True)
            else:
                wanted.append((path, int(mode, 8), oid, int(length)))
        if not backup.prefix:
            git.run("read-tree", backup.head, check=False)  # fails for a tree that git has in no index
        for piece in _pieces(wanted):
            asked = "".join(f"{oid}\n" for _, _, oid, _ in piece).encode()
            answer = git.run("cat-file", "--batch", stdin=asked, timeout=600).stdout
            at = 0
            for path, bits, oid, size in piece:
                start = answer.index(b"\n", at) + 1
                content = answer[start : start + size]
                at = start + size + 1
                if object_id("blob", content, backup.algorithm).hex() != oid:
                    raise HostError("the backup is damaged: a file is not what was committed", details=shown(path))
                if bits == LINK:
                    self._links.append((self._place(path), content))
                else:
                    self._write(path, content, 0o755 if bits == EXECUTABLE else 0o644)

    def _write_work(self, work: Manifest) -> None:
        left = dict(work.items)
        with tarfile.open(self._folder / "work.tar", "r:", errors="surrogateescape") as tar:
            for member in tar:
                path = member.name
                item = left.pop(path, None)
                if item is None or not self._may_be_written(path):
                    raise HostError("the backup is damaged: it has a file that is not on its list", details=shown(path))
                if item.kind == "dir":
                    self._place(path).mkdir(exist_ok=True)
                elif item.kind == "symlink":
                    self._links.append((self._place(path), os.fsencode(item.target or "")))
                else:
                    self._copy(tar, member, path, item)
        if left:
            raise HostError("the backup is damaged: files are missing", details=shown(next(iter(left))))

    def _copy(self, tar: tarfile.TarFile, member: tarfile.TarInfo, path: str, item: Item) -> None:
        source = tar.extractfile(member)
        digest = hashlib.sha256()
        with self._place(path).open("xb") as file:
            while source is not None and (piece := source.read(1 << 20)):
                digest.update(piece)
                file.write(piece)
            os.fchmod(file.fileno(), item.mode)
        if digest.hexdigest() != item.sha256:
            raise HostError("the backup is damaged: a file is not what was kept", details=shown(path))

    def _write(self, path: str, content: bytes, mode: int) -> None:
        with self._place(path).open("xb") as file:
            file.write(content)
            os.fchmod(file.fileno(), mode)

    def _place(self, path: str) -> Path:
        """Where a path goes. Its folders are made; no link is there yet, so it cannot lead away."""
        place = self._staged / path
        place.parent.mkdir(parents=True, exist_ok=True)
        return place

    @staticmethod
    def _may_be_written(path: str) -> bool:
        try:
            checked_path(path, _MAX_DEPTH)
        except ValueError:
            return False
        return not any(is_git_folder(part) for part in os.fsencode(path).split(b"/"))


def _pieces(wanted: list[tuple[str, int, str, int]]) -> Iterator[list[tuple[str, int, str, int]]]:
    piece: list[tuple[str, int, str, int]] = []
    total = 0
    for one in wanted:
        if piece and total + one[3] > _PIECE:
            yield piece
            piece, total = [], 0
        piece.append(one)
        total += one[3]
    if piece:
        yield piece
