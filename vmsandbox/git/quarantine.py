"""Looks at a pack that a guest sent, where it can do no harm, and hands on what is sound.

A pack is a program for git's parsers: it can unpack to a thousand times its size, name objects that only the host has,
and hold trees with `.git/hooks/…` in them. So it is unpacked nowhere: `index-pack --strict` reads it under limits in a
repository that has nothing else; each tree is read again by our own rules; what the tips reach must be in the pack or
in what the guest was given; and the host's repository gets a pack that the host's git has made of exactly that.

git 2.39's `fetch` of a bundle takes trees with `.git` in them, whatever `transfer.fsckObjects` says; so no fetch here.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Container, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from vmsandbox.errors import GuestError, HostError
from vmsandbox.git.names import is_gitmodules, is_read_by_git, name_problem
from vmsandbox.git.objects import DIGEST_SIZES, EXECUTABLE, FILE, GITLINK, LINK, TREE, parse_tree
from vmsandbox.git.touching import Denied, Touched, batch, touching
from vmsandbox.policy.tree.gitrun import GitLimits, HostGit
from vmsandbox.process import Finished, Programs
from vmsandbox.review.text import shown_bytes

# Findings of git's fsck that `--strict` alone lets pass (git-fsck(1), "fsck messages"; those of severity INFO).
_STRICT = "badFilemode=error,gitmodulesParse=error,gitattributesSymlink=error,gitignoreSymlink=error"
_MODES = {TREE, GITLINK, LINK, EXECUTABLE, FILE}
_PIECE = 16 << 20


@dataclass(frozen=True)
class PackLimits:
    """What a guest's commits may be. Sizes in bytes, times in seconds.

    pack: as sent. objects: in it. object_bytes: one of them unpacked. unpacked: all of them. tree_bytes: all trees.
    """

    pack: int = 512 << 20
    objects: int = 500_000
    object_bytes: int = 512 << 20
    unpacked: int = 4 << 30
    tree_bytes: int = 256 << 20
    branches: int = 100
    seconds: int = 600
    process: GitLimits = field(default_factory=lambda: GitLimits(cpu=300, memory=3 << 30, file=2 << 30))


@dataclass(frozen=True)
class Submodule:
    """A tree names another repository at this path. url: as its .gitmodules says, safe to show; "" if it does not."""

    path: str
    url: str


def make_bare(folder: Path, algorithm: str, alternate: Path | None = None) -> Path:
    """An empty repository with a configuration of our own; `alternate`: an objects folder to look into besides."""
    for name in ("objects/info", "objects/pack", "refs"):
        (folder / name).mkdir(parents=True)
    (folder / "HEAD").write_text("ref: refs/heads/none\n")
    extension = f"[extensions]\n\tobjectformat = {algorithm}\n" if algorithm != "sha1" else ""
    version = int(algorithm != "sha1")
    (folder / "config").write_text(f"[core]\n\trepositoryformatversion = {version}\n\tbare = true\n{extension}")
    if alternate is not None:
        if "\n" in os.fspath(alternate):
            raise HostError("the repository's path has a newline, which git cannot refer to")
        (folder / "objects/info/alternates").write_bytes(_quoted(os.fsencode(alternate)) + b"\n")
    return folder


@contextmanager
def quarantine(record: Path, algorithm: str, limits: PackLimits, programs: Programs, given: Given | None
               ) -> Iterator[Quarantine]:  # fmt: skip
    """A quarantine repository in a session's record; it goes, with all in it, whatever happens."""
    folder = Path(tempfile.mkdtemp(prefix="commits-", dir=record))
    try:
        make_bare(folder / "git", algorithm, given.objects if given else None)
        yield Quarantine(folder, algorithm, limits, programs, given)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@dataclass(frozen=True)
class Given:
    """What the guest had of the host's repository: all that `base` reaches, cut at `shallow`. objects: the host's."""

    base: str
    shallow: tuple[str, ...]
    objects: Path


class Quarantine:
    """One pack under examination. Use `quarantine`."""

    def __init__(
        self, folder: Path, algorithm: str, limits: PackLimits, programs: Programs, given: Given | None
    ) -> None:
        self.pack = folder / "git/objects/pack/untrusted.pack"
        self._folder = folder
        self._algorithm = algorithm
        self._limits = limits
        self._given = given
        self._git = HostGit(programs, folder / "git", limits=limits.process)
        self.left_out: dict[str, Touched | None] = {}  # tips that `sound_pack` did not pack, and what they touch
        if given and given.shallow:
            (folder / "git/shallow").write_text("".join(one + "\n" for one in given.shallow))

    def sound_pack(self, tips: Iterable[str], denied: Denied | None = None) -> tuple[Path, list[Submodule]]:
        """Examine `self.pack`; a pack (path without its ending) of what the tips have and the host has not.

        Tips with commits that touch what is denied are examined like the others, and then left out (`left_out`).

        Raises:
            GuestError: it is over a limit, malformed, incomplete, or has something that no repository should.
        """
        wanted = sorted(set(tips))
        self._check_header()
        self._ask(
            "index-pack", f"--strict={_STRICT}", f"--object-format={self._algorithm}",
            f"--max-input-size={self._limits.pack}", "--threads=1", "-o", self.pack.with_suffix(".idx"), self.pack,
        )  # fmt: skip
        kinds = self._kinds()
        submodules = self._check_trees({oid: size for oid, (kind, size) in kinds.items() if kind == "tree"})
        reached = self._check_connected(wanted, kinds)
        if denied is not None:
            known = [f"^{denied.base}"] if self._given or denied.base in kinds else []
            self.left_out = touching(self._ask, self._algorithm, wanted, known, denied)
            wanted = [one for one in wanted if one not in self.left_out]
        return self._made_anew(wanted), self._flagged(submodules, reached)

    # -- steps ---------------------------------------------------------------------------------------------

    def _check_header(self) -> None:
        """gitformat-pack(5): "PACK", version, number of objects; before git allocates by that number."""
        with self.pack.open("rb") as file:
            untrusted = file.read(12)
        if len(untrusted) < 12 or untrusted[:8] != b"PACK\0\0\0\2":
            raise _bad("it is not a pack", shown_bytes(untrusted))
        count = int.from_bytes(untrusted[8:])
        if count > self._limits.objects:
            raise _bad(f"it has {count} objects; at most {self._limits.objects} are taken")
        if self.pack.stat().st_size > self._limits.pack:
            raise _bad(f"it has more than {self._limits.pack >> 20} MiB")

    def _kinds(self) -> dict[str, tuple[str, int]]:
        """Each object of the pack with its type and size; the sizes are checked."""
        index = self.pack.with_suffix(".idx").read_bytes()
        rows = self._ask("show-index", f"--object-format={self._algorithm}", stdin=index).text.splitlines()
        oids = [row.split()[1] for row in rows]  # "offset object-id (crc)"
        answers = self._ask("cat-file", "--batch-check", stdin=_lines(oids)).text.splitlines()
        kinds = {oid: (kind, int(size)) for oid, kind, size in (answer.split() for answer in answers)}
        largest = max((size for _kind, size in kinds.values()), default=0)
        total = sum(size for _kind, size in kinds.values())
        names = sum(size for kind, size in kinds.values() if kind == "tree")
        if largest > self._limits.object_bytes:
            raise _bad(f"an object has {largest} bytes; at most {self._limits.object_bytes} are taken")
        if total > self._limits.unpacked or names > self._limits.tree_bytes:
            raise _bad(f"unpacked it has {total} bytes, {names} of them names; that is over the limit")
        return kinds

    def _check_trees(self, sizes: dict[str, int]) -> list[tuple[str, str]]:
        """Our own rules for trees; returns (tree, name) of each submodule."""
        found: list[tuple[str, str]] = []
        for piece in _pieces(sizes):
            for oid, content in batch(self._ask("cat-file", "--batch", stdin=_lines(piece)).stdout):
                try:
                    seen: set[bytes] = set()
                    for mode, name, _oid in parse_tree(content, self._algorithm):
                        problem = name_problem(name)
                        if mode not in _MODES:
                            problem = f"the mode {mode:o}"
                        elif mode == LINK and is_read_by_git(name):
                            problem = "a link where git reads settings"
                        elif name in seen:
                            problem = "a name twice"
                        if problem:
                            raise ValueError(f"{problem}: {shown_bytes(name)}")
                        seen.add(name)
                        if mode == GITLINK:
                            found.append((oid, os.fsdecode(name)))
                except ValueError as error:
                    raise _bad(str(error), f"tree {oid}") from None
        return found

    def _check_connected(self, tips: list[str], kinds: Container[str]) -> dict[str, str]:
        """Whatever the tips reach is in the pack or was given; returns object → path of what is new.

        On purpose not "or is in the host's repository": a guest that names an object that it was never given would get
        it into its branch, and with the next session into its hands.
        """
        self._check_tips(tips)
        rows = self._reached([*tips, *([f"^{self._given.base}"] if self._given else [])])
        outside = [oid for oid in rows if oid not in kinds]
        if outside:
            was_given = self._reached([self._given.base]) if self._given else {}
            for oid in outside:
                if oid not in was_given:
                    raise _bad("it builds on an object that is neither in it nor was given to the guest", oid)
        return rows

    def _check_tips(self, tips: list[str]) -> None:
        rows = self._ask("cat-file", "--batch-check", stdin=_lines(tips)).text.splitlines()
        for oid, row in zip(tips, rows, strict=True):
            if row.split()[:2] != [oid, "commit"]:
                raise _bad("a branch is not at a commit that was sent or given", oid)

    def _reached(self, revisions: list[str]) -> dict[str, str]:
        found = self._ask("rev-list", "--objects", "--stdin", stdin=_lines(revisions)).stdout
        rows = (row.partition(b" ") for row in found.split(b"\n") if row)
        # A path may have a newline: what follows it is then a row of its own, which is no object's id.
        size = DIGEST_SIZES[self._algorithm] * 2
        return {oid.decode(): os.fsdecode(path) for oid, _, path in rows if len(oid) == size and _is_hexadecimal(oid)}

    def _made_anew(self, tips: list[str]) -> Path:
        """The host's git packs what is reachable and new: nothing else of what was sent goes on."""
        out = self._folder / "sound"
        request = [*tips, *([f"^{self._given.base}"] if self._given else [])]
        name = self._ask("pack-objects", "-q", "--revs", out, stdin=_lines(request)).text.strip()
        return out.with_name(f"sound-{name}")

    def _flagged(self, submodules: list[tuple[str, str]], reached: dict[str, str]) -> list[Submodule]:
        """Submodules by path, with the URLs that some .gitmodules of the pack gives. Nothing is fetched or entered."""
        if not submodules:
            return []
        urls: dict[str, str] = {}
        for oid in [oid for oid, path in reached.items() if is_gitmodules(os.fsencode(path.rpartition("/")[2]))][:100]:
            found = self._ask("config", f"--blob={oid}", "--no-includes", "-z", "--list", check=False).stdout
            pairs = dict(row.partition("\n")[::2] for row in os.fsdecode(found).split("\0") if row)
            for key, value in pairs.items():
                if key.startswith("submodule.") and key.endswith(".path"):
                    urls[value] = pairs.get(key.removesuffix(".path") + ".url", "")
        rows = []
        for tree, name in submodules:
            parent = reached.get(tree, "")
            path = f"{parent}/{name}" if parent else name
            rows.append(Submodule(shown_bytes(os.fsencode(path)), shown_bytes(os.fsencode(urls.get(path, "")))))
        return sorted(set(rows), key=lambda one: (one.path, one.url))

    def _ask(self, subcommand: str, *arguments: str | Path, stdin: bytes | None = None, check: bool = True) -> Finished:
        """git in the quarantine; its failure is the guest's fault."""
        try:
            return self._git.run(
                subcommand, *arguments, stdin=stdin, timeout=self._limits.seconds, check=check,
                config=[("core.bigFileThreshold", "32m"), ("pack.threads", "1"), ("core.deltaBaseCacheLimit", "64m"),
                        ("core.packedGitLimit", "256m"), ("pack.window", "0"), ("transfer.fsckObjects", "true")],
            )  # fmt: skip
        except HostError as error:
            # git's last words quote what was sent: names, messages.
            raise _bad(f"git {subcommand} does not take it", shown_bytes(os.fsencode(error.details), 1500)) from error


def _pieces(sizes: dict[str, int]) -> Iterator[list[str]]:
    """Objects to read in one go: their bytes are in memory at once."""
    piece: list[str] = []
    total = 0
    for oid, size in sizes.items():
        if piece and total + size > _PIECE:
            yield piece
            piece, total = [], 0
        piece.append(oid)
        total += size
    if piece:
        yield piece


def _lines(words: Iterable[str]) -> bytes:
    return "".join(word + "\n" for word in words).encode()


def _is_hexadecimal(text: bytes) -> bool:
    return not text.strip(b"0123456789abcdef")


def _quoted(path: bytes) -> bytes:
    """A path as `alternates` takes any: in double quotes, as a C string (gitrepository-layout(5), git's quote.c)."""
    return b'"' + path.replace(b"\\", b"\\\\").replace(b'"', b'\\"') + b'"'


def _bad(why: str, details: str = "") -> GuestError:
    return GuestError(
        f"the guest's commits are refused: {why}",
        details=details,
        resolution="nothing of them was kept; the files themselves can still be reviewed (`vmsandbox changes`)",
    )
