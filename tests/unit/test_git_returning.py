"""Commits that come back: what is sound lands below refs/vmsandbox and changes nothing else; all else is refused."""

from __future__ import annotations

import hashlib
import os
import zlib
from collections.abc import Iterable
from pathlib import Path

import pytest
from git_repositories import commit, commit_text, git, handmade_pack, make_repository, pack_of, state_of, text

from vmsandbox.errors import GuestError, HostError
from vmsandbox.git import touching
from vmsandbox.git.landing import land
from vmsandbox.git.names import is_git_folder, is_plain_branch
from vmsandbox.git.objects import TreeEntry, encode_tree, object_id
from vmsandbox.git.quarantine import Given, PackLimits, Submodule, quarantine
from vmsandbox.git.touching import Denied
from vmsandbox.policy.tree.gitrun import GitLimits, HostGit
from vmsandbox.process import Programs
from vmsandbox.review.returning import DeniedReturns
from vmsandbox.session.transfer.commits import parse_untrusted_branches, receive_untrusted

SESSION = "20260102-030405-t-abcdef"
EMPTY_TREE = "4b825dc642cb6eb9a060e54bf8d69288fbee4904"


@pytest.fixture
def host(tmp_path: Path) -> Path:
    return make_repository(tmp_path / "host", {"a": "1", "d/b": "2"})


def examine(
    tmp_path: Path,
    pack: bytes | Path,
    tips: Iterable[str],
    given: Given | None = None,
    limits: PackLimits | None = None,
) -> list[Submodule]:
    """Only the examination. The quarantine must be gone afterwards."""
    record = tmp_path / "record"
    record.mkdir(exist_ok=True)
    try:
        with quarantine(record, "sha1", limits or PackLimits(), Programs(), given) as held:
            held.pack.write_bytes(pack if isinstance(pack, bytes) else pack.read_bytes())
            return held.sound_pack(tips)[1]
    finally:
        assert list(record.iterdir()) == [], "something of the guest's was kept"


def bring_in(host: Path, tmp_path: Path, pack: bytes, tips: dict[str, str], given: Given | None) -> dict[str, str]:
    record = tmp_path / "record"
    record.mkdir(exist_ok=True)
    with quarantine(record, "sha1", PackLimits(), Programs(), given) as held:
        held.pack.write_bytes(pack)
        sound, _ = held.sound_pack(tips.values())
        new = sound if sound.with_name(sound.name + ".pack").exists() else None
        return land(HostGit(Programs(), host / ".git"), host / ".git", new, SESSION, tips)


def given_all(host: Path) -> Given:
    return Given(text(host, "rev-parse", "HEAD"), (), host / ".git/objects")


def clone(host: Path, target: Path) -> Path:
    git(target.parent, "-c", "protocol.file.allow=always", "clone", "-q", host, target)
    return target


def test_a_commit_lands_below_its_session_and_nothing_else_changes(host: Path, tmp_path: Path) -> None:
    git(host, "tag", "v1")
    given = given_all(host)
    guest = commit(clone(host, tmp_path / "guest"), {"a": "2", "new": "n"}, "by the agent")
    tip = text(guest, "rev-parse", "HEAD")
    before, index = state_of(host), (host / ".git/index").stat().st_mtime_ns
    refs = bring_in(host, tmp_path, pack_of(guest, tip, f"^{given.base}"), {"main": tip, "x/y": tip}, given)
    assert refs == {"main": f"refs/vmsandbox/{SESSION}/main", "x/y": f"refs/vmsandbox/{SESSION}/x/y"}
    after = state_of(host)
    assert {name: after.get(name) for name in before} == before
    assert (host / ".git/index").stat().st_mtime_ns == index
    added = sorted(after.keys() - before.keys())
    assert [name for name in added if "objects/pack/pack-" not in name] == [
        f".git/refs/vmsandbox/{SESSION}/main", f".git/refs/vmsandbox/{SESSION}/x/y",
    ]  # fmt: skip
    assert text(host, "log", "-1", "--format=%s", refs["main"]) == "by the agent"
    git(host, "fsck", "--strict")

    # later in the same session: its own refs move on
    commit(guest, {"a": "3"}, "more")
    further = text(guest, "rev-parse", "HEAD")
    bring_in(host, tmp_path, pack_of(guest, further, f"^{given.base}"), {"main": further}, given)
    assert text(host, "rev-parse", refs["main"], refs["x/y"]) == f"{further}\n{tip}"


def test_an_unrelated_history_needs_nothing_of_the_host(host: Path, tmp_path: Path) -> None:
    guest = make_repository(tmp_path / "guest", {"a": "1"})
    tip = text(guest, "rev-parse", "HEAD")
    refs = bring_in(host, tmp_path, pack_of(guest, tip), {"main": tip}, None)
    assert text(host, "show", f"{refs['main']}:a") == "1"


def test_a_branch_on_a_commit_that_was_given_needs_no_pack(host: Path, tmp_path: Path) -> None:
    first = text(host, "rev-parse", "HEAD")
    commit(host, {"a": "2"})
    refs = bring_in(host, tmp_path, pack_of(host, first, "^HEAD"), {"old": first}, given_all(host))
    assert text(host, "rev-parse", refs["old"]) == first


def test_a_revert_to_old_content_counts_as_given(host: Path, tmp_path: Path) -> None:
    commit(host, {"a": "2"})
    given = given_all(host)
    guest = commit(clone(host, tmp_path / "guest"), {"a": "1"}, "back")
    tip = text(guest, "rev-parse", "HEAD")
    old_blob = text(host, "rev-parse", "HEAD~:a")
    pack = tmp_path / "thin.pack"
    tree = encode_tree([TreeEntry(0o100644, b"a", bytes.fromhex(old_blob)),
                        TreeEntry(0o040000, b"d", bytes.fromhex(text(host, "rev-parse", "HEAD:d")))])  # fmt: skip
    new = commit_text(object_id("tree", tree, "sha1").hex(), given.base)
    ids = handmade_pack(pack, ("tree", tree), ("commit", new))
    examine(tmp_path, pack, [ids[1]], given)
    examine(tmp_path, pack_of(guest, tip, f"^{given.base}"), [tip], given)


def evil_tree(name: bytes, mode: int = 0o100644, content: bytes = b"x") -> tuple[bytes, bytes]:
    oid = bytes.fromhex(EMPTY_TREE) if mode == 0o040000 else object_id("blob", content, "sha1")
    return b"%o %s\0%s" % (mode, name, oid), content


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        (b".git", 0o040000), (b".GIT", 0o040000), (b".git ", 0o040000), (b".git.", 0o040000), (b"git~1", 0o040000),
        (b".g\xe2\x80\x8cit", 0o040000), (b".git::$INDEX_ALLOCATION", 0o040000), (b"x\\.git", 0o040000),
        (b".git", 0o100644), (b".git", 0o120000), (b"..", 0o040000), (b".", 0o040000), (b"", 0o040000),
        (b"a/b", 0o100644), (b"../../etc", 0o100644),
        (b".gitmodules", 0o120000), (b".GITMODULES", 0o120000), (b"gitmod~1", 0o120000), (b".gitattributes", 0o120000),
        (b"odd", 0o100777), (b"odd", 0o104755), (b"odd", 0o010644), (b"odd", 0),
    ],
)  # fmt: skip
@pytest.mark.parametrize("ours_alone", [False, True])
def test_a_tree_with_names_or_modes_that_none_should_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: bytes, mode: int, ours_alone: bool
) -> None:
    """Both guards hold alone: git's own (`index-pack --strict`) and ours, which does not depend on git's version."""
    if ours_alone:
        without_strict(monkeypatch)
    tree, blob = evil_tree(name, mode)
    outer = encode_tree([TreeEntry(0o040000, b"sub", object_id("tree", tree, "sha1"))])
    pack = tmp_path / "evil.pack"
    objects = [("blob", blob), ("tree", b""), ("tree", tree), ("tree", outer)]
    tip = handmade_pack(pack, *objects, ("commit", commit_text(object_id("tree", outer, "sha1").hex())))[-1]
    with pytest.raises(GuestError, match="refused") as caught:
        examine(tmp_path, pack, [tip])
    assert ours_alone == ("index-pack" not in caught.value.brief)


def without_strict(monkeypatch: pytest.MonkeyPatch) -> None:
    real = HostGit.run

    def run(self: HostGit, subcommand: str, *words: object, **options: object) -> object:
        return real(self, subcommand, *(w for w in words if not str(w).startswith("--strict")), **options)  # type: ignore[arg-type]

    monkeypatch.setattr(HostGit, "run", run)


def test_the_same_name_twice_and_a_cut_off_tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_strict(monkeypatch)
    one, blob = evil_tree(b"a")
    for number, tree in enumerate((one + one, b"100644 a\0short")):
        pack = tmp_path / f"{number}.pack"
        ids = handmade_pack(
            pack, ("blob", blob), ("tree", tree), ("commit", commit_text(object_id("tree", tree, "sha1").hex()))
        )
        with pytest.raises(GuestError, match="refused"):
            examine(tmp_path, pack, [ids[-1]])


def test_submodules_are_named_and_never_entered(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    modules = (
        f'[submodule "s"]\n\tpath = lib/s\n\turl = ext::sh -c touch% {canary}\n'
        '[submodule "t"]\n\tpath = t\n\turl = ../../elsewhere\n'
    ).encode()
    lib = encode_tree([TreeEntry(0o160000, b"s", bytes.fromhex("11" * 20))])
    root = encode_tree([
        TreeEntry(0o100644, b".gitmodules", object_id("blob", modules, "sha1")),
        TreeEntry(0o040000, b"lib", object_id("tree", lib, "sha1")),
        TreeEntry(0o160000, b"t", bytes.fromhex("22" * 20)),
    ])  # fmt: skip
    pack = tmp_path / "p.pack"
    tip = handmade_pack(pack, ("blob", modules), ("tree", lib), ("tree", root),
                        ("commit", commit_text(object_id("tree", root, "sha1").hex())))[-1]  # fmt: skip
    found = examine(tmp_path, pack, [tip])
    assert [one.path for one in found] == ["lib/s", "t"]
    assert found[0].url.startswith("ext::sh -c") and found[1].url == "../../elsewhere"
    assert not canary.exists()


@pytest.mark.parametrize(
    "modules",
    [
        b'[submodule "../../evil"]\n\tpath = s\n\turl = x\n',
        b'[submodule "s"]\n\tpath = s\n\turl = -u./payload\n',
        b'[submodule "s"]\n\tpath = s\n\turl = x\n\tupdate = !touch /tmp/x\n',
        b"[submodule",
    ],
)
def test_a_submodule_with_a_name_url_or_command_that_git_forbids(tmp_path: Path, modules: bytes) -> None:
    root = encode_tree([TreeEntry(0o100644, b".gitmodules", object_id("blob", modules, "sha1"))])
    pack = tmp_path / "p.pack"
    tip = handmade_pack(
        pack, ("blob", modules), ("tree", root), ("commit", commit_text(object_id("tree", root, "sha1").hex()))
    )[-1]
    with pytest.raises(GuestError, match="index-pack"):
        examine(tmp_path, pack, [tip])


def test_objects_that_the_guest_was_not_given(host: Path, tmp_path: Path) -> None:
    """The host has them, on another branch: a guest that knows or guesses an id must not get them into its own."""
    base = given_all(host)
    git(host, "checkout", "-q", "-b", "private")
    commit(host, {"diary": "private"}, "private")
    blob, private = text(host, "rev-parse", "HEAD:diary"), text(host, "rev-parse", "HEAD")
    tree = encode_tree([TreeEntry(0o100644, b"mine-now", bytes.fromhex(blob))])
    tree_id = object_id("tree", tree, "sha1").hex()
    pack = tmp_path / "p.pack"
    tip = handmade_pack(pack, ("tree", tree), ("commit", commit_text(tree_id, base.base)))[-1]
    with pytest.raises(GuestError, match="neither in it nor was given"):
        examine(tmp_path, pack, [tip], base)
    tip = handmade_pack(pack, ("commit", commit_text(EMPTY_TREE, private)), ("tree", b""))[0]
    with pytest.raises(GuestError, match="neither in it nor was given"):
        examine(tmp_path, pack, [tip], base)
    empty = pack_of(host, private, f"^{private}")
    with pytest.raises(GuestError, match="neither in it nor was given"):
        examine(tmp_path, empty, [private], base)


def test_what_is_missing_or_no_commit(host: Path, tmp_path: Path) -> None:
    pack = tmp_path / "p.pack"
    for parents in ((), ("33" * 20,)):
        tip = handmade_pack(
            pack, ("commit", commit_text("44" * 20 if not parents else EMPTY_TREE, *parents)), ("tree", b"")
        )[0]
        for given in (None, given_all(host)):
            with pytest.raises(GuestError, match="refused"):
                examine(tmp_path, pack, [tip], given)
    ids = handmade_pack(pack, ("blob", b"x"), ("tree", b""))
    for tip in (*ids, "55" * 20):
        with pytest.raises(GuestError, match="not at a commit"):
            examine(tmp_path, pack, [tip])


def test_a_thin_pack_a_forged_base_and_rubbish(host: Path, tmp_path: Path) -> None:
    base_blob = os.urandom(4000)
    (host / "big").write_bytes(base_blob)
    commit(host, {})
    given = given_all(host)
    # REF_DELTA against an object of the host's: gitformat-pack(5), type 7
    delta = b"\xa0\x1f\xa0\x1f" + b"\xb0\xa0\x0f"
    body = (
        b"PACK\0\0\0\2\0\0\0\1"
        + bytes([0x70 | len(delta)])
        + object_id("blob", base_blob, "sha1")
        + zlib.compress(delta)
    )
    for pack in (body + hashlib.sha1(body).digest(), b"", b"PACK", b"GIF89a" * 10, b"PACK\0\0\0\2\0\0\0\1" + b"x" * 40):
        with pytest.raises(GuestError, match="refused"):
            examine(tmp_path, pack, [given.base], given)


def test_bombs_meet_limits(tmp_path: Path) -> None:
    pack = tmp_path / "bomb.pack"
    big = bytes(64 << 20)
    tree = encode_tree([TreeEntry(0o100644, b"zeros", object_id("blob", big, "sha1"))])
    tip = handmade_pack(
        pack, ("blob", big), ("tree", tree), ("commit", commit_text(object_id("tree", tree, "sha1").hex()))
    )[-1]
    assert pack.stat().st_size < 1 << 20
    assert examine(tmp_path, pack, [tip]) == []
    for limits, why in (
        (PackLimits(object_bytes=32 << 20), "an object has"),
        (PackLimits(unpacked=32 << 20), "unpacked it has"),
        (PackLimits(objects=2), "3 objects"),
        (PackLimits(pack=1000), "more than"),
        (PackLimits(tree_bytes=10), "over the limit"),
    ):
        with pytest.raises(GuestError, match=why):
            examine(tmp_path, pack, [tip], limits=limits)


def test_a_delta_bomb_is_stopped_by_its_memory(tmp_path: Path) -> None:
    """A base of 64 KiB and a delta of some bytes that says: a gigabyte."""
    base = bytes(0xFFFF)
    copies = b"\xb0\xff\xff"  # gitformat-pack(5): copy 0xffff bytes from offset 0
    count = 16_400

    def varint(number: int) -> bytes:
        out = bytearray()
        while number > 0x7F:
            out.append(number & 0x7F | 0x80)
            number >>= 7
        return bytes([*out, number])

    delta = varint(len(base)) + varint(0xFFFF * count) + copies * count
    head = bytearray([0x70 | len(delta) & 15 | 0x80])
    size = len(delta) >> 4
    while size > 0x7F:
        head.append(size & 0x7F | 0x80)
        size >>= 7
    head.append(size)
    blob_head = bytes([0x30 | 0x80 | 0xF, *(lambda n: [n & 0x7F | 0x80, n >> 7])(0xFFFF >> 4)])
    body = b"PACK\0\0\0\2\0\0\0\2" + blob_head + zlib.compress(base)
    body += bytes(head) + object_id("blob", base, "sha1") + zlib.compress(delta)
    pack = body + hashlib.sha1(body).digest()
    limits = PackLimits(process=GitLimits(cpu=20, memory=600 << 20, file=1 << 30))
    with pytest.raises(GuestError, match="index-pack") as caught:
        examine(tmp_path, pack, ["66" * 20], limits=limits)
    assert "memory" in caught.value.details or "malloc" in caught.value.details


def test_junk_beside_the_commits_does_not_reach_the_host(host: Path, tmp_path: Path) -> None:
    tree = encode_tree([TreeEntry(0o100644, b"a", object_id("blob", b"wanted", "sha1"))])
    path = tmp_path / "p.pack"
    ids = handmade_pack(path, ("blob", b"junk"), ("blob", b"wanted"), ("tree", tree),
                        ("commit", commit_text(object_id("tree", tree, "sha1").hex())))  # fmt: skip
    bring_in(host, tmp_path, path.read_bytes(), {"main": ids[-1]}, None)
    assert text(host, "cat-file", "-t", ids[1]) == "blob"
    assert text(host, "cat-file", "-t", ids[0], check=False) == ""


def test_a_ref_in_the_way_leaves_everything_as_it_was(host: Path, tmp_path: Path) -> None:
    guest = commit(clone(host, tmp_path / "guest"), {"a": "2"})
    given, tip = given_all(host), text(guest, "rev-parse", "HEAD")
    before = state_of(host)
    with pytest.raises(HostError):  # `a` and `a/b` cannot both be
        bring_in(host, tmp_path, pack_of(guest, tip, f"^{given.base}"), {"a": tip, "a/b": tip}, given)
    assert state_of(host) == before

    # A symbolic ref that leads to main is replaced, not followed.
    git(host, "symbolic-ref", f"refs/vmsandbox/{SESSION}/main", "refs/heads/main")
    bring_in(host, tmp_path, pack_of(guest, tip, f"^{given.base}"), {"main": tip}, given)
    assert text(host, "rev-parse", "refs/heads/main") == given.base


def test_branches_are_taken_by_their_names_alone() -> None:
    oid = "a" * 40
    rows = ["main", "feature/x-1", "v1.2+3"]
    tips, skipped = parse_untrusted_branches("".join(f"{oid} refs/heads/{n}\n" for n in rows).encode(), 10)
    assert list(tips) == rows and skipped == []
    odd = [
        "-x",
        "a..b",
        "a.lock",
        "a.LOCK/b",
        "é",
        "a b",
        "a//b",
        "/a",
        "a/",
        "a@{1}",
        "x\x1b[2J",
        "HEAD",
        ".a",
        "a.",
        "$(id)",
        "a" * 201,
    ]
    for name in odd:
        assert not is_plain_branch(name), name
        tips, skipped = parse_untrusted_branches(f"{oid} refs/heads/{name}\n".encode(), 10)
        assert tips == {} and len(skipped) == 1 and "\x1b" not in skipped[0]
    for line in (
        b"zz refs/heads/a\n", b"%s refs/tags/a\n" % oid.encode(), b"%s HEAD\n" % oid.encode(), b"\n",
        b"%s refs/heads/../../../x\n" % oid.encode() * 11, b"%s refs/heads/a\n" % oid.encode() * 2,
        b"--output=x refs/heads/a\n", oid.upper().encode() + b" refs/heads/a\n",
    ):  # fmt: skip
        with pytest.raises(GuestError):
            parse_untrusted_branches(line, 10)


@pytest.mark.parametrize(
    "name", [b".git", b".GiT", b"git~1", b"GIT~12", b".git. . ", b".gi\xe2\x80\x8dt", b".git:x", b"a\\.git"]
)
def test_names_that_some_file_system_takes_for_git(name: bytes) -> None:
    assert is_git_folder(name)


@pytest.mark.parametrize("name", [b".github", b".gitignore", b"git", b"x.git", b".git2", b"git~x", b"\xff.git"])
def test_names_that_are_only_alike(name: bytes) -> None:
    assert not is_git_folder(name)


class Flood:
    """A channel whose other side sends for ever, or sends nothing for ever."""

    closed = eof_received = False

    def __init__(self, piece: bytes) -> None:
        self.piece = piece

    def recv_ready(self) -> bool:
        return bool(self.piece)

    def recv(self, size: int) -> bytes:
        return self.piece[:size]

    def recv_stderr_ready(self) -> bool:
        return False

    def exit_status_ready(self) -> bool:
        return False

    def fileno(self) -> int:
        raise ValueError


def test_an_endless_or_silent_sender_is_left(tmp_path: Path) -> None:
    kept: list[int] = []
    with pytest.raises(GuestError, match="larger than"):
        receive_untrusted(Flood(bytes(65536)), lambda data: kept.append(len(data)), PackLimits(pack=1 << 20))
    assert sum(kept) <= 1 << 20
    with pytest.raises(GuestError, match="within"):
        receive_untrusted(Flood(b""), kept.append, PackLimits(seconds=1))


def test_a_repository_with_sha256(tmp_path: Path) -> None:
    host = make_repository(tmp_path / "host", {"a": "1"}, "--object-format=sha256")
    given = given_all(host)
    git(host, "checkout", "-q", "-b", "side")
    commit(host, {"a": "2"})
    tip = text(host, "rev-parse", "HEAD")
    record = tmp_path / "record"
    record.mkdir()
    with quarantine(record, "sha256", PackLimits(), Programs(), given) as held:
        held.pack.write_bytes(pack_of(host, tip, f"^{given.base}"))
        sound, _ = held.sound_pack([tip])
        assert sound.with_name(sound.name + ".idx").exists()
        land(HostGit(Programs(), host / ".git"), host / ".git", sound, SESSION, {"main": tip})
    assert text(host, "rev-parse", f"refs/vmsandbox/{SESSION}/main") == tip


# -- places that nothing comes back from ---------------------------------------------------------------------


def left_out(tmp_path: Path, guest: Path, given: Given | None, base: str, *branches: str) -> dict[str, str]:
    """Branch → the denied path that it touches; and what passed must be in the pack that goes on."""
    tips = {branch: text(guest, "rev-parse", branch) for branch in branches}
    record = tmp_path / "record"
    record.mkdir(exist_ok=True)
    denied = Denied(base, DeniedReturns((".github/", "*.pem")).rule)
    with quarantine(record, "sha1", PackLimits(), Programs(), given) as held:
        held.pack.write_bytes(pack_of(guest, *tips.values(), *([f"^{base}"] if given else [])))
        sound, _ = held.sound_pack(tips.values(), denied)
        packed = text(tmp_path, "show-index", stdin=sound.with_name(sound.name + ".idx").read_bytes())
    for branch, oid in tips.items():
        assert (oid in packed) == (oid not in held.left_out), branch
    found = {branch: held.left_out[oid] for branch, oid in tips.items() if oid in held.left_out}
    return {branch: touched.path if touched else "?" for branch, touched in found.items()}


@pytest.fixture
def workflows(tmp_path: Path) -> Path:
    return make_repository(tmp_path / "host", {"a": "1", ".github/w/ci.yml": "old", "d/e/f": "1"})


@pytest.mark.parametrize(
    ("files", "touched"),
    [
        ({"a": "2", "new/x": "1"}, None), ({".github/w/ci.yml": "new"}, ".github"), ({".github/x": "1"}, ".github"),
        ({"d/e/key.pem": "1"}, "d/e/key.pem"), ({"deep/.github/x": "1"}, "deep/.github"),
        ({"d/.GitHub": "1"}, "d/.GitHub"),
    ],
)  # fmt: skip
def test_a_branch_that_touches_a_denied_place_stays_out(
    workflows: Path, tmp_path: Path, files: dict[str, str], touched: str | None
) -> None:
    given = given_all(workflows)
    guest = clone(workflows, tmp_path / "guest")
    git(guest, "checkout", "-q", "-b", "work")
    commit(guest, files)
    git(guest, "checkout", "-q", "-b", "fine", given.base)
    commit(guest, {"d/e/f": "2"})
    found = left_out(tmp_path, guest, given, given.base, "work", "fine")
    assert found == ({"work": touched} if touched else {})


def test_a_touch_that_was_taken_back_counts(workflows: Path, tmp_path: Path) -> None:
    given = given_all(workflows)
    guest = clone(workflows, tmp_path / "guest")
    commit(guest, {".github/w/ci.yml": "evil"})
    commit(guest, {".github/w/ci.yml": "old"})
    commit(guest, {"a": "harmless"})
    assert left_out(tmp_path, guest, given, given.base, "main") == {"main": ".github"}
    git(guest, "checkout", "-q", "-b", "gone", given.base)
    git(guest, "rm", "-q", "-r", ".github")
    git(guest, "commit", "-q", "-m", "gone")
    assert left_out(tmp_path, guest, given, given.base, "gone") == {"gone": ".github"}


def test_a_merge_brings_no_old_state_back(workflows: Path, tmp_path: Path) -> None:
    """A side branch of before a fix, merged so that the fix is gone: no commit of its own has touched it."""
    commit(workflows, {".github/w/ci.yml": "fixed"})
    given = given_all(workflows)
    guest = clone(workflows, tmp_path / "guest")
    git(guest, "checkout", "-q", "-b", "side", "HEAD~")
    commit(guest, {"a": "2"})
    assert left_out(tmp_path, guest, given, given.base, "side") == {}
    git(guest, "merge", "-q", "-s", "ours", "-m", "m", "main")
    assert left_out(tmp_path, guest, given, given.base, "side") == {"side": ".github"}


def test_a_snapshot_that_the_guest_builds_on_has_touched_nothing(workflows: Path, tmp_path: Path) -> None:
    base = text(workflows, "rev-parse", "HEAD")
    guest = commit(clone(workflows, tmp_path / "guest"), {"a": "2"})
    assert left_out(tmp_path, guest, None, base, "main") == {}
    other = make_repository(tmp_path / "other", {"a": "2", ".github/w/ci.yml": "old"})
    assert left_out(tmp_path, other, None, base, "main") == {"main": ".github"}


def test_a_tree_with_endless_paths_is_given_up(host: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forty levels, each of which has the one below it ten times."""
    monkeypatch.setattr(touching, "_MOST_ENTRIES", 20_000)
    objects: list[tuple[str, bytes]] = [("blob", b"x")]
    entry, mode = object_id("blob", b"x", "sha1"), 0o100644
    for _ in range(40):
        tree = encode_tree([TreeEntry(mode, b"%d" % number, entry) for number in range(10)])
        objects.append(("tree", tree))
        entry, mode = object_id("tree", tree, "sha1"), 0o040000
    given = given_all(host)
    pack = tmp_path / "bomb.pack"
    tip = handmade_pack(pack, *objects, ("commit", commit_text(entry.hex(), given.base)))[-1]
    record = tmp_path / "record"
    record.mkdir()
    with quarantine(record, "sha1", PackLimits(), Programs(), given) as held:
        held.pack.write_bytes(pack.read_bytes())
        held.sound_pack([tip], Denied(given.base, DeniedReturns((".github/",)).rule))
    assert held.left_out == {tip: None}
