"""Puts commits that passed into the host's repository: one pack, and refs below `refs/vmsandbox/SESSION/`.

Nothing else of the repository may change: a guest that could move `refs/heads/main`, a tag or a replace ref would
decide what the person's next `git push` publishes.
"""

from __future__ import annotations

import os
import secrets
import shutil
from contextlib import suppress
from pathlib import Path

from vmsandbox.errors import HostError
from vmsandbox.policy.tree.gitrun import HostGit

PREFIX = "refs/vmsandbox"


def land(git: HostGit, common_dir: Path, pack: Path | None, session_id: str, tips: dict[str, str]) -> dict[str, str]:
    """Add a pack (its path without the ending; None: nothing new) and create the refs, all of them or none.

    Args:
        git: on the host's repository. common_dir: where its objects and refs are.
        tips: branch (checked with `is_plain_branch`) → commit.

    Returns:
        Branch → ref. A ref that this session made before is moved on; any other is in the way and an error.

    Raises:
        HostError: the repository cannot be written. What was added is gone again.
    """
    refs = {branch: f"{PREFIX}/{session_id}/{branch}" for branch in tips}
    found = git.text("for-each-ref", "--format=%(refname) %(objectname)", f"{PREFIX}/{session_id}/")
    old = dict(row.rsplit(" ", 1) for row in found.splitlines())
    added = _add_pack(common_dir / "objects/pack", pack) if pack is not None else []
    commands = b""
    for branch, ref in refs.items():
        if ref not in old:
            commands += f"create {ref}\0{tips[branch]}\0".encode()
        elif old[ref] != tips[branch]:
            commands += f"update {ref}\0{tips[branch]}\0{old[ref]}\0".encode()
    try:
        git.run("update-ref", "--no-deref", "--stdin", "-z", stdin=commands)
    except BaseException:
        for path in reversed(added):  # the index first: without it the pack is not there for git
            path.unlink(missing_ok=True)
        raise
    _give_to_owner(common_dir, [*added, *_folders_of(common_dir / "refs", session_id)])
    return refs


def _add_pack(folder: Path, pack: Path) -> list[Path]:
    """Copy a pack and its index in, the index last (git's own order); returns those that were not there before."""
    added: list[Path] = []
    try:
        folder.mkdir(exist_ok=True)
        for ending in (".pack", ".idx"):
            # The name of a pack is the hash of its content, so one that is there is the same.
            target = folder / f"pack-{pack.name.rpartition('-')[2]}{ending}"
            if target.exists():
                continue
            staged = folder / f"tmp_vmsandbox_{secrets.token_hex(8)}"  # `git gc` removes an old tmp_*
            try:
                with pack.with_name(pack.name + ending).open("rb") as source, staged.open("xb") as copy:
                    shutil.copyfileobj(source, copy, 1 << 20)
                    os.fchmod(copy.fileno(), 0o444)
                    copy.flush()
                    os.fsync(copy.fileno())
                staged.rename(target)
            finally:
                staged.unlink(missing_ok=True)
            added.append(target)
    except OSError as error:
        for path in reversed(added):
            path.unlink(missing_ok=True)
        raise HostError(
            "the commits cannot be added to the repository", details=str(error), resolution="is its disk full?"
        ) from error
    return added


def _folders_of(refs: Path, session_id: str) -> list[Path]:
    top = refs / "vmsandbox"
    return [top, top / session_id, *(top / session_id).rglob("*")] if top.is_dir() else []


def _give_to_owner(common_dir: Path, paths: list[Path]) -> None:
    """Root works on a person's repository: what was made there is the person's, who could not remove it otherwise."""
    if os.geteuid() != 0:
        return
    status = common_dir.stat()
    for path in paths:
        with suppress(OSError):
            os.chown(path, status.st_uid, status.st_gid, follow_symlinks=False)
