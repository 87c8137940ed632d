"""Names in a tree that some git or some file system takes for git's own.

`.GIT/config` written on a file system that folds case is `.git/config`: a checkout of such a tree on another machine
runs what it says (CVE-2014-9390, CVE-2019-1352 and their kin). git's own checks differ by version and platform; these
here are the strictest of all platforms, always.
"""

from __future__ import annotations

import re

# Code points that HFS+ ignores in names (git's utf8.c, next_hfs_char).
_HFS_IGNORES = re.compile("[\u200c-\u200f\u202a-\u202e\u206a-\u206f\ufeff]")
_NTFS_ENDS = re.compile(r"[\\:]")  # a separator, and an alternate data stream
_GIT = re.compile(r"\.git|git~\d+")
_GITMODULES = re.compile(r"\.gitmodules|gitmod~\d+|gi7eba~\d+")  # the last: NTFS's hashed short names
_PLUMBING = re.compile(
    r"\.git(modules|attributes|ignore)|\.mailmap|git(mod|att|ign)~\d+|mailma~\d+|(gi7eba|gi7d29|gi250a|maba30)~\d+"
)


def is_git_folder(name: bytes) -> bool:
    """Whether a component of a path is `.git` for any file system."""
    return any(_GIT.fullmatch(form) for form in _forms(name))


def is_gitmodules(name: bytes) -> bool:
    """Whether a component of a path is `.gitmodules` for any file system."""
    return any(_GITMODULES.fullmatch(form) for form in _forms(name))


def is_read_by_git(name: bytes) -> bool:
    """Whether git itself reads a file of this name from a tree; as a symbolic link it would lead elsewhere."""
    return any(_PLUMBING.fullmatch(form) for form in _forms(name))


def name_problem(name: bytes) -> str | None:
    """Why a tree may not have an entry of this name, in words, or None."""
    if name in (b"", b".", b".."):
        return "a name that is empty, '.' or '..'"
    if b"/" in name or b"\0" in name:
        return "a name with a slash or a NUL"
    if is_git_folder(name):
        return "git's own folder as a name"
    return None


_BRANCH_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+-]*")


def is_plain_branch(name: str) -> bool:
    """Whether a branch's name is one that can be nothing else: narrower than git-check-ref-format(1)."""
    parts = name.split("/")
    return (
        len(name) <= 200
        and len(parts) <= 8
        and all(
            _BRANCH_PART.fullmatch(part) and ".." not in part and not part.lower().endswith((".", ".lock"))
            for part in parts
        )
        and name != "HEAD"
    )


def _forms(name: bytes) -> list[str]:
    text = _HFS_IGNORES.sub("", name.decode("utf-8", "surrogateescape")).casefold()
    return [piece.rstrip(" .") for piece in _NTFS_ENDS.split(text)]
