"""Makes the repository that a guest gets: as files, on the host, from what may be given and nothing else.

Copying the host's `.git` would hand out other branches, reflogs, remotes with credentials in their URLs, and hooks.
What is made here has one branch, one pack, an index and a configuration of our own. History comes out of the host's
repository only when a person asks for it, and only if nothing in it is denied or looks like a secret.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

from vmsandbox.errors import RefusedError, UserInputError
from vmsandbox.git.names import is_git_folder, is_plain_branch
from vmsandbox.git.objects import (
    EXECUTABLE,
    FILE,
    LINK,
    TREE,
    IndexEntry,
    PackWriter,
    TreeEntry,
    encode_index,
    encode_tree,
    object_id,
)
from vmsandbox.policy.tree.denied import DeniedPaths
from vmsandbox.policy.tree.gitrun import HostGit
from vmsandbox.policy.tree.secrets import built_in
from vmsandbox.review.manifest import Item, Manifest
from vmsandbox.review.text import shown

SHALLOW_COMMITS = 50
SNAPSHOT_BYTES = 256 << 20  # a snapshot sends everything a second time: above this nobody would wait for it
DEFAULT_BRANCH = "main"
_IDENTITY = "vmsandbox guest <guest@vmsandbox.invalid>"
_MOMENT = "946684800 +0000"  # the same files give the same commit, whenever and by whomever it is made
_HASHED_BYTES = 64 << 20  # the guest's git looks into larger files itself
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


@dataclass(frozen=True)
class GuestRepository:
    """A `.git` folder to be copied into a guest.

    base: the commit it starts from (hexadecimal). pack: `given-HASH`, the path of two files without their endings
    (`.pack`, `.idx`). shallow: commits whose parents were not given. small: path below `.git` → content.
    """

    base: str
    branch: str
    algorithm: str
    pack: Path
    shallow: tuple[str, ...] = ()
    small: dict[str, bytes] = field(default_factory=dict)


class Snapshot:
    """A repository with one commit, made of files one after the other: what was pushed, and nothing else.

    Made here and not by `git add` in the guest, because under emulation that takes 1.3 s for 200 files and 38 s for
    10,000 (100 MB); here it is 0.03 s and 1.6 s, most of them while the guest unpacks.

    Args:
        folder: an empty folder on the host, where the pack is made.
    """

    def __init__(self, algorithm: str, folder: Path) -> None:
        self._algorithm = algorithm
        self._folder = folder
        self._file = (folder / "snapshot.pack").open("w+b")
        self._writer = PackWriter(self._file, algorithm)
        self._entries: list[IndexEntry] = []

    def add(self, path: str, item: Item, content: bytes, mtime: int) -> None:
        """One file or link (content: where it leads), as it was sent. mtime: seconds."""
        raw = os.fsencode(path)
        if item.kind not in ("file", "symlink") or any(is_git_folder(part) for part in raw.split(b"/")):
            return  # git would refuse to add it, and others to take it
        oid = self._writer.add("blob", content)
        self._entries.append(IndexEntry(raw, _git_mode(item), oid, mtime, len(content)))

    def finish(self) -> GuestRepository:
        """The repository; its pack is complete."""
        tree = _write_trees(self._writer, self._entries)
        text = f"tree {tree.hex()}\nauthor {_IDENTITY} {_MOMENT}\ncommitter {_IDENTITY} {_MOMENT}\n\nAs copied in\n"
        base = self._writer.add("commit", text.encode()).hex()
        self._writer.finish()
        self.close()
        pack = self._folder / f"given-{base}"
        (self._folder / "snapshot.pack").rename(pack.with_suffix(".pack"))
        pack.with_suffix(".idx").write_bytes(self._writer.index())
        return _assembled(GuestRepository(base, DEFAULT_BRANCH, self._algorithm, pack), self._entries)

    def close(self) -> None:
        """Give the file back, also where it was not finished."""
        self._file.close()


def snapshot(root: Path, pushed: Manifest, algorithm: str, folder: Path) -> GuestRepository:
    """A repository with one commit: what was pushed, its bytes read again and checked against the manifest.

    Args:
        root: the project. folder: an empty folder on the host, where the pack is made.

    Raises:
        UserInputError: a file is no longer what was sent.
    """
    with closing(Snapshot(algorithm, folder)) as made:
        for path, item in pushed.items.items():
            if item.kind in ("file", "symlink"):
                made.add(path, item, *_sent_content(root, path, item))
        return made.finish()


def history(git: HostGit, root: Path, pushed: Manifest, denied: DeniedPaths, folder: Path, *, shallow: bool,
            own_shallow: frozenset[str] = frozenset()) -> GuestRepository | None:  # fmt: skip
    """A repository with the current branch's history, or None where there is no commit yet.

    Args:
        git: on the host's repository. root: the project, the top of its work tree.
        denied: the policy's denied paths. folder: an empty folder on the host, where the pack is made.
        own_shallow: commits without their parents in the host's repository (it is a shallow clone itself).

    Raises:
        RefusedError: something in the history is denied by the policy or has the name of a secret.
    """
    found = git.run("rev-parse", "--verify", "--quiet", "HEAD^{commit}", check=False)
    if found.status != 0:
        return None
    base = found.text.strip()
    algorithm = git.text("rev-parse", "--show-object-format")
    commits, cut = _commits(git, base, own_shallow, SHALLOW_COMMITS if shallow else None)
    _refuse_leaks(_paths(git, commits, cut), denied)
    request = [*(f"--shallow {one}" for one in cut), base]
    name = git.run(
        "pack-objects", "-q", "--revs", *(["--shallow"] if cut else []), folder / "given",
        stdin="".join(line + "\n" for line in request).encode(), timeout=600,
        options=["--shallow-file", ""] if cut else [],
    ).text.strip()  # fmt: skip
    entries = list(_index_entries(git, base, root, pushed, algorithm))
    branch = git.run("symbolic-ref", "--quiet", "--short", "HEAD", check=False).text.strip()
    if not is_plain_branch(branch):
        branch = DEFAULT_BRANCH
    given = GuestRepository(base, branch, algorithm, folder / f"given-{name}", tuple(cut))
    return _assembled(given, entries)


def _assembled(made: GuestRepository, entries: Iterable[IndexEntry]) -> GuestRepository:
    made.small.update(
        {
            "HEAD": f"ref: refs/heads/{made.branch}\n".encode(),
            "config": _configuration(made.algorithm),
            "description": b"made by vmsandbox\n",
            "info/exclude": b"",
            f"refs/heads/{made.branch}": f"{made.base}\n".encode(),
            "index": encode_index(entries, made.algorithm),
        }
    )
    if made.shallow:
        made.small["shallow"] = "".join(one + "\n" for one in sorted(made.shallow)).encode()
    return made


def _configuration(algorithm: str) -> bytes:
    lines = [
        "[core]",
        f"\trepositoryformatversion = {int(algorithm != 'sha1')}",
        "\tfilemode = true",
        "\tbare = false",
        "\tlogallrefupdates = true",
        # The index was made elsewhere: of what it says of a file, only time (seconds) and size hold in the guest.
        "\tcheckStat = minimal",
        "\ttrustctime = false",
        *(["[extensions]", f"\tobjectformat = {algorithm}"] if algorithm != "sha1" else []),
        "[user]",  # the person's name and address stay on the host
        "\tname = vmsandbox guest",
        "\temail = guest@vmsandbox.invalid",
        "[gc]",
        "\tauto = 0",
    ]
    return "\n".join([*lines, ""]).encode()


def _sent_content(root: Path, path: str, item: Item) -> tuple[bytes, int]:
    """What was sent of this path, and the time it was changed. The digest makes any way to the bytes a safe one."""
    import hashlib

    if item.kind == "symlink":
        return os.fsencode(item.target or ""), 0
    try:
        fd = os.open(root / path, _READ)
        with os.fdopen(fd, "rb") as file:
            status = os.fstat(fd)
            content = file.read(item.size + 1) if stat.S_ISREG(status.st_mode) else b""
    except OSError as error:
        raise _changed(path, error.strerror) from error
    if len(content) != item.size or hashlib.sha256(content).hexdigest() != item.sha256:
        raise _changed(path, "it is not what was sent")
    return content, int(status.st_mtime)


def _write_trees(writer: PackWriter, entries: Iterable[IndexEntry]) -> bytes:
    """Write the folders' trees, the deepest first; returns the id of the whole."""
    folders: dict[bytes, list[TreeEntry]] = {b"": []}
    for one in entries:
        parent, _, name = one.path.rpartition(b"/")
        folders.setdefault(parent, []).append(TreeEntry(one.mode, name, one.oid))
        while parent:
            parent = parent.rpartition(b"/")[0]
            folders.setdefault(parent, [])
    for folder in sorted((name for name in folders if name), key=lambda name: -name.count(b"/")):
        parent, _, name = folder.rpartition(b"/")
        folders[parent].append(TreeEntry(TREE, name, writer.add("tree", encode_tree(folders[folder]))))
    return writer.add("tree", encode_tree(folders[b""]))


def _commits(git: HostGit, base: str, own_shallow: frozenset[str], most: int | None) -> tuple[list[str], list[str]]:
    """The commits to give, and those of them whose parents are not given."""
    limit = [] if most is None else [f"--max-count={most}"]
    lines = git.run("rev-list", "--parents", *limit, base, timeout=600).text.splitlines()
    rows = [line.split() for line in lines]
    chosen = {row[0] for row in rows}
    cut = [row[0] for row in rows if row[0] in own_shallow or any(parent not in chosen for parent in row[1:])]
    return [row[0] for row in rows], cut


def _paths(git: HostGit, commits: list[str], cut: list[str]) -> Iterator[str]:
    """Every path of every file in these commits (some more than once).

    On purpose not `rev-list --objects`: that names one path for each object, and names only up to a newline.
    """
    whole = set(cut)
    inner = "".join(one + "\n" for one in commits if one not in whole).encode()
    options = ("--stdin", "-r", "-z", "-m", "--root", "--name-only", "--no-commit-id", "--no-renames",
               "--no-ext-diff", "--no-textconv")  # fmt: skip
    outputs = [git.run("diff-tree", *options, stdin=inner, timeout=600)]
    outputs += (git.run("ls-tree", "-r", "-z", "--name-only", "--full-tree", one) for one in cut)
    for found in outputs:
        yield from os.fsdecode(found.stdout).split("\0")[:-1]


def _refuse_leaks(paths: Iterable[str], denied: DeniedPaths) -> None:
    secrets, leaks = built_in(), {}
    looked: set[str] = set()
    for path in paths:
        folder = False
        while path and path not in looked:
            looked.add(path)
            parent, _, name = path.rpartition("/")
            if secrets.match(path, name, folder):
                leaks[path] = "its name is that of a secret"
            elif denied and (pattern := denied.match(path, name)):
                leaks[path] = f"denied by the policy ({pattern})"
            path, folder = parent, True
    if leaks:
        rows = [f"{shown(path, 200)}: {why}" for path, why in sorted(leaks.items())]
        more = [f"and {len(rows) - 20} more"] if len(rows) > 20 else []
        raise RefusedError(
            f"the history has what must not leave the host: {rows[0]}",
            details="\n".join(rows[:20] + more),
            resolution="give no history (`--history none`): the guest starts with one commit of what is copied in",
        )


def _index_entries(git: HostGit, base: str, root: Path, pushed: Manifest, algorithm: str) -> Iterator[IndexEntry]:
    """The base commit's files as an index; those that were sent unchanged with their time and size."""
    for row in git.run("ls-tree", "-r", "-z", "--full-tree", base, timeout=300).stdout.split(b"\0")[:-1]:
        facts, _, raw = row.partition(b"\t")
        mode, _kind, hexadecimal = facts.split(b" ")
        oid = bytes.fromhex(hexadecimal.decode())
        path = os.fsdecode(raw)
        item = pushed.items.get(path)
        entry = IndexEntry(raw, int(mode, 8), oid)
        if item is not None and item.kind == "file" and item.size <= _HASHED_BYTES:
            content, mtime = _sent_content(root, path, item)
            if object_id("blob", content, algorithm) == oid:
                entry = entry._replace(mtime=mtime, size=item.size)
        elif item is None and os.path.lexists(root / path):
            entry = entry._replace(assume_unchanged=True)  # it stayed on the host: in the guest it is not "deleted"
        yield entry


def _git_mode(item: Item) -> int:
    if item.kind == "symlink":
        return LINK
    return EXECUTABLE if item.mode & 0o100 else FILE


def _changed(path: str, why: str | None) -> UserInputError:
    return UserInputError(
        f"changed since it was sent: {shown(path)}",
        details=why or "",
        resolution="stop what writes to the project, and try again",
    )
