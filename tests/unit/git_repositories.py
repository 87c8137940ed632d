"""Real repositories for the tests, and the plain git that a person would run in them."""

from __future__ import annotations

import hashlib
import os
import subprocess
from dataclasses import fields
from pathlib import Path

from vmsandbox.git.giving import GuestRepository
from vmsandbox.git.objects import PackWriter
from vmsandbox.paths import Layout
from vmsandbox.review.manifest import Item, Manifest

PLAIN = {
    "PATH": os.environ["PATH"],
    "HOME": "/nonexistent",
    "GIT_CONFIG_NOSYSTEM": "1",
    "GIT_CONFIG_GLOBAL": "/dev/null",
    "GIT_AUTHOR_NAME": "t",
    "GIT_AUTHOR_EMAIL": "t@t",
    "GIT_COMMITTER_NAME": "t",
    "GIT_COMMITTER_EMAIL": "t@t",
}


def git(folder: Path, *words: str | Path, stdin: bytes | None = None, check: bool = True) -> bytes:
    """stdout of plain git in a folder, stripped."""
    done = subprocess.run(
        ["git", *map(str, words)], cwd=folder, env=PLAIN, input=stdin, capture_output=True, timeout=60
    )
    assert not check or done.returncode == 0, (words, done.stderr)
    return done.stdout.strip()


def text(folder: Path, *words: str | Path, **options: object) -> str:
    return git(folder, *words, **options).decode()  # type: ignore[arg-type]


def make_repository(root: Path, files: dict[str, str], *options: str) -> Path:
    """A repository on `main` with one commit of these files."""
    root.mkdir(parents=True, exist_ok=True)
    git(root, "init", "-q", "-b", "main", *options)
    return commit(root, files)


def commit(root: Path, files: dict[str, str], message: str = "c") -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
    git(root, "add", "-f", "-A")
    git(root, "commit", "-q", "-m", message)
    return root


def manifest_of(root: Path) -> Manifest:
    """What a push of everything would have sent."""
    items: dict[str, Item] = {}
    for folder, names, files in os.walk(root):
        if ".git" in names:
            names.remove(".git")
        for name in [*names, *files]:
            path = Path(folder, name)
            relative = os.path.relpath(path, root)
            if relative.split("/")[0] == ".git":
                continue
            if path.is_symlink():
                items[relative] = Item("symlink", 0, target=os.readlink(path))
            elif path.is_dir():
                items[relative] = Item("dir", 0o755)
            else:
                data = path.read_bytes()
                items[relative] = Item("file", path.stat().st_mode & 0o777, len(data), hashlib.sha256(data).hexdigest())
    return Manifest(items)


def unpack(made: GuestRepository, target: Path) -> Path:
    """A guest's `.git`, put where a guest would have it."""
    for name, content in made.small.items():
        path = target / ".git" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    packs = target / ".git/objects/pack"
    packs.mkdir(parents=True)
    for ending in (".pack", ".idx"):
        (packs / f"pack-{made.base}{ending}").write_bytes(made.pack.with_name(made.pack.name + ending).read_bytes())
    return target


def pack_of(folder: Path, *revisions: str) -> bytes:
    """What the guest's side sends."""
    return subprocess.run(
        ["git", "pack-objects", "-q", "--revs", "--stdout"],
        cwd=folder, env=PLAIN, input="".join(f"{one}\n" for one in revisions).encode(), capture_output=True, check=True,
    ).stdout  # fmt: skip


def handmade_pack(path: Path, *objects: tuple[str, bytes]) -> list[str]:
    """A pack of exactly these objects, whatever git would say to them; returns their ids."""
    with path.open("w+b") as file:
        writer = PackWriter(file, "sha1")
        ids = [writer.add(kind, content).hex() for kind, content in objects]
        writer.finish()
    return ids


def commit_text(tree: str, *parents: str) -> bytes:
    lines = [f"tree {tree}", *(f"parent {one}" for one in parents)]
    return "\n".join([*lines, "author t <t@t> 1 +0000", "committer t <t@t> 1 +0000", "", "m", ""]).encode()


def state_of(root: Path) -> dict[str, str]:
    """Every file below a folder with its content's digest, `.git` included: to see that nothing changed."""
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file() and not path.is_symlink()
    }


def layout_in(home: Path) -> Layout:
    """A layout below a folder whose path may be too long for sockets: no guest runs here."""
    return Layout(**{one.name: home / one.name for one in fields(Layout)})
