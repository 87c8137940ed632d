"""The proof at a session's end: it finds one flipped byte and each thing that is left, and nothing that others do."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_session_folder import info_of

from vmsandbox.hypervisor.files import sha256_of, stamp_of
from vmsandbox.paths import Layout
from vmsandbox.session.live.ending import end_session
from vmsandbox.session.resources.baseline import baseline_of, differences, domain_facts, keep_baseline, kept_baseline
from vmsandbox.session.state.folder import SessionFolder
from vmsandbox.session.state.info import SessionInfo

DIGEST = "0" * 64
KEY, BASE = "1" * 32, "2" * 32


def write_template(layout: Layout, key: str, base: str | None) -> None:
    folder = layout.templates / key
    folder.mkdir(parents=True)
    names = ("disk.qcow2", "ram", "state")
    for name in names:
        (folder / name).write_bytes(os.urandom(5000))
    manifest = {
        "base": base,
        "digests": {name: sha256_of(folder / name) for name in names},
        "stamps": {name: stamp_of(folder / name) for name in names},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.fixture
def layout(short_home: Path) -> Layout:
    layout = Layout.from_environment({"VMSANDBOX_HOME": str(short_home)})
    folder = layout.images / "base" / DIGEST[:16]
    folder.mkdir(parents=True)
    (folder / "root.ext4").write_bytes(os.urandom(5000))
    facts = {"root.ext4": {"sha256": sha256_of(folder / "root.ext4"), "size": 5000}}
    (folder / "manifest.json").write_text(json.dumps({"files": facts}))
    (layout.cache / "verified").mkdir(parents=True)
    stamps = [DIGEST, [stamp_of(folder / "root.ext4")]]
    (layout.cache / "verified" / f"base-{DIGEST[:16]}.json").write_text(json.dumps(stamps))
    write_template(layout, BASE, None)
    write_template(layout, KEY, BASE)
    return layout


@pytest.fixture
def session(layout: Layout) -> tuple[SessionFolder, SessionInfo]:
    folder, info = SessionFolder(layout, "one"), info_of("one", image_digest=DIGEST, template=KEY)
    folder.claim(info)
    keep_baseline(folder, info)
    return folder, info


def flip(path: Path) -> None:
    """One bit, and both times as they were before."""
    status = path.stat()
    content = bytearray(path.read_bytes())
    content[2500] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def events(folder: SessionFolder, info: SessionInfo) -> list[tuple[str, dict[str, object]]]:
    return [(record["kind"], record["data"]) for record in folder.journal(info.id).read()]


def test_an_end_that_leaves_all_as_it_was_is_proven(session: tuple[SessionFolder, SessionInfo]) -> None:
    folder, info = session
    ended = end_session(folder.layout, folder, info, "ended")
    assert ended.left == ended.differs == ()
    assert [kind for kind, _ in events(folder, info)] == ["baseline.proven", "session.closed"]
    assert events(folder, info)[0][1]["files"] == 2 + 4 + 4


@pytest.mark.parametrize(
    ("path", "named"),
    [
        (f"images/base/{DIGEST[:16]}/root.ext4", "image base: root.ext4 has changed"),
        (f"templates/{KEY}/ram", "template 111111111111: ram has changed"),
        (f"templates/{BASE}/disk.qcow2", "template's base 222222222222: disk.qcow2 has changed"),
    ],
)
def test_one_flipped_bit_is_told(session: tuple[SessionFolder, SessionInfo], path: str, named: str) -> None:
    folder, info = session
    flip(folder.layout.live.parent / path)
    ended = end_session(folder.layout, folder, info, "ended")
    assert len(ended.differs) == 1 and named in ended.differs[0]
    kind, data = events(folder, info)[0]
    assert kind == "baseline.differs" and data["differences"] == list(ended.differs)


def test_a_file_that_is_gone_or_new_to_its_manifest_is_told(session: tuple[SessionFolder, SessionInfo]) -> None:
    folder, info = session
    (folder.layout.templates / KEY / "state").unlink()
    manifest = folder.layout.templates / BASE / "manifest.json"
    manifest.write_text(manifest.read_text() + " ")
    ended = end_session(folder.layout, folder, info, "ended")
    assert sorted(one.partition(": SHA")[0] for one in ended.differs) == [
        "template 111111111111: state is missing",
        "template's base 222222222222: manifest.json has changed",
    ]


def test_what_has_new_times_and_the_same_bytes_is_the_same(session: tuple[SessionFolder, SessionInfo]) -> None:
    folder, info = session
    for path in (folder.layout.templates / KEY / "ram", folder.layout.images / "base" / DIGEST[:16] / "root.ext4"):
        content = path.read_bytes()
        path.unlink()
        path.write_bytes(content)
    assert end_session(folder.layout, folder, info, "ended").differs == ()


def test_verify_hashes_and_so_finds_what_no_time_tells(
    session: tuple[SessionFolder, SessionInfo], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, info = session
    before = baseline_of(folder.layout, None, info)
    flip(folder.layout.templates / KEY / "ram")
    # As on a disk that lies: the times are those of the manifest.
    manifest_file = folder.layout.templates / KEY / "manifest.json"
    stamps = json.loads(manifest_file.read_text())["stamps"]
    monkeypatch.setattr(
        "vmsandbox.session.resources.baseline.stamp_of", lambda path: tuple(stamps.get(path.name, (0,) * 5))
    )
    assert differences(before, baseline_of(folder.layout, None, info)) == []
    (told,) = differences(before, baseline_of(folder.layout, None, info, verify=True))
    assert "ram has changed" in told


def test_what_is_left_of_it_is_named(session: tuple[SessionFolder, SessionInfo]) -> None:
    folder, info = session
    qemu = subprocess.Popen(["qemu-test", "-c", "import time; time.sleep(60)", info.uuid], executable=sys.executable)
    sockets = folder.sockets(info)
    sockets.mkdir()
    (sockets / "control").touch()
    try:
        while not Path(f"/proc/{qemu.pid}/cmdline").read_bytes().startswith(b"qemu"):
            time.sleep(0.01)
        before = kept_baseline(folder)
        assert before is not None
        shutil.rmtree(folder.path)
        left = differences(before, baseline_of(folder.layout, None, info))
        assert left == ["process: QEMU is left", "folder of sockets is left", "socket: control is left"]
    finally:
        qemu.kill()
        qemu.wait()


def test_others_do_not_disturb_it(session: tuple[SessionFolder, SessionInfo], layout: Layout) -> None:
    folder, info = session
    write_template(layout, "3" * 32, None)
    SessionFolder(layout, "two").claim(info_of("two", uuid="99999999-2222-4333-8444-555555555555"))
    (layout.run / "two-abcdef").mkdir()
    os.utime(layout.templates / KEY / "manifest.json")  # when it was last used
    assert end_session(layout, folder, info, "ended").differs == ()


def test_a_guest_is_the_same_machine_whatever_tells_it_from_the_next() -> None:
    def xml(uuid: str, number: str, run: str, memory: str, disk: str = "vda") -> str:
        return (
            f"<domain type='kvm' id='{number}'><name>vmsandbox-{run}</name><uuid>{uuid}</uuid><genid>{uuid}</genid>"
            f"<devices><disk><source file='/h/live/one/vm/disk.qcow2'/><target dev='{disk}'/></disk>"
            f"<channel><source path='/h/run/{run}/control'/></channel></devices>"
            f"<seclabel><label>+{number}</label></seclabel>"
            f"<arg value='memory-backend-file,mem-path={memory},size=1M'/></domain>"
        )

    first = info_of("one")
    second = info_of("one", uuid="99999999-2222-4333-8444-555555555555")
    same = domain_facts(xml(first.uuid, "1", "one-aaaaaa", "/proc/12/fd/5"), first)
    assert same == domain_facts(xml(second.uuid, "27", "one-bbbbbb", "/proc/999/fd/17"), second)
    assert same != domain_facts(xml(second.uuid, "27", "one-bbbbbb", "/proc/999/fd/17", "vdb"), second)
