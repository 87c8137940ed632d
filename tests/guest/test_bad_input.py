"""What is missing or wrong: a clear error, the right status, and nothing left (`nothing_left` looks after each)."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from harness import Cli, Guest

from vmsandbox.errors import GuestError
from vmsandbox.hypervisor import making
from vmsandbox.render.domain import DomainPlan, render_domain
from vmsandbox.session.asked.request import SessionRequest
from vmsandbox.session.sandbox import Sandbox


def refused(done: subprocess.CompletedProcess[bytes], *says: str) -> None:
    text = done.stderr.decode()
    assert "Traceback" not in text
    for word in says:
        assert word in text, text


def test_a_name_in_use(guest: Guest) -> None:
    refused(guest.cli("start", "--empty", "--name", guest.name, status=125), "exists already", "vmsandbox stop shared")
    assert guest.exec("echo", "still here").stdout == b"still here\n"


@pytest.mark.parametrize("name", ["Bad", "a b", "../x", "-n", "x" * 41])
def test_a_name_that_is_none(cli: Cli, name: str) -> None:
    refused(cli("start", "--empty", f"--name={name}", status=125), "not a session name")


def test_an_image_that_is_not_there(cli: Cli) -> None:
    refused(cli("session", "--empty", "--image", "nothing", "--", "true", status=125), "nothing")
    refused(cli("session", "--empty", "--image", "../../etc", "--", "true", status=125), "image name")


def test_a_bad_recipe(cli: Cli, tmp_path: Path) -> None:
    recipe = tmp_path / "bad.yaml"
    recipe.write_text("name: bad\npackages: 7\nno_such_key: 1\n")
    refused(cli("image", "build", recipe, status=125), "bad.yaml")


def test_emulation_without_leave_is_refused_and_with_it_is_stamped(cli: Cli, guest: Guest) -> None:
    if guest.info.grade != "emulated":
        pytest.skip("KVM works here")
    strict = Cli(cli.home, {"VMSANDBOX_ALLOW_EMULATION": ""})
    done = strict("session", "--empty", "--", "true", status=126)
    refused(done, "not a security boundary", "--allow-emulation")
    done = strict("session", "--empty", "--allow-emulation", "--", "true")
    refused(done, "NOT a security boundary", "isolation grade was 'emulated'")
    (row,) = [row for row in cli.json("ls") if row["name"] == guest.name]
    assert row["grade"] == "emulated" and row["state"] == "running"
    (event,) = [event for event in guest.journal() if event["kind"] == "guest.isolation"]
    assert event["data"]["grade"] == "emulated"
    assert event["data"]["checks"]["seccomp"].startswith("ok") and event["data"]["checks"]["not_root"].startswith("ok")


def test_no_libvirt(cli: Cli) -> None:
    nowhere = Cli(cli.home, {"VMSANDBOX_LIBVIRT_URI": "qemu+unix:///system?socket=/nonexistent/sock"})
    refused(nowhere("session", "--empty", "--", "true", status=125), "libvirt does not answer", "doctor --fix")


def test_no_qemu(cli: Cli, tmp_path: Path) -> None:
    """A PATH with everything but QEMU's programs."""
    for folder in ("/usr/bin", "/bin"):
        for program in Path(folder).iterdir():
            if not program.name.startswith(("qemu", "kvm")) and not (tmp_path / program.name).is_symlink():
                (tmp_path / program.name).symlink_to(program)
    without = Cli(cli.home, {"PATH": str(tmp_path)})
    done = without("session", "--empty", "--", "true", status=125)
    refused(done, "not installed", "doctor")


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small file system")
def test_a_full_disk(other_home: Cli) -> None:
    live = other_home.home / "live"
    live.mkdir(mode=0o711)
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k,mode=0711", "none", live], capture_output=True
    ).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        done = other_home("session", "--empty", "--name", "full", "--", "true", status=125)
        refused(done, "no room for another guest", "of disk are needed", "vmsandbox gc")
        assert list(live.iterdir()) == []
    finally:
        subprocess.run(["umount", "-l", live], check=True)


def flip_byte(path: Path, at: int) -> None:
    path.chmod(0o600)
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)
        file.seek(at)
        file.write(bytes([byte[0] ^ 1]))


def copied(original: Path, copy: Path) -> Path:
    """A copy and no hard links: those change the original's ctime, and each later session would hash it again."""
    subprocess.run(["cp", "-a", "--sparse=always", original, copy], check=True)
    return copy


def test_a_template_with_one_byte_changed_is_refused(without_templates: Cli, guest: Guest) -> None:
    home, original = without_templates, guest.cli.layout.templates / guest.info.template
    copy = copied(original, home.layout.templates / original.name)
    home("session", "--empty", "--", "true")  # a copy as such is accepted, or the rest shows nothing
    for name in ("ram", "state", "disk.qcow2", "initrd"):
        middle = (copy / name).stat().st_size // 2
        flip_byte(copy / name, middle)
        done = home("session", "--empty", "--", "true", status=125)
        refused(done, name, "was changed after it was made", "gc --templates")
        flip_byte(copy / name, middle)


def test_a_byte_that_flips_under_a_session_is_told_at_its_end(without_templates: Cli, guest: Guest) -> None:
    home, original = without_templates, guest.cli.layout.templates / guest.info.template
    copy = copied(original, home.layout.templates / original.name)
    home("start", "--empty", "--no-snapshot", "--name", "flips")
    session_id = home.guest("flips").info.id
    flip_byte(copy / "initrd", 5000)
    done = home("stop", "flips")
    refused(done, "WARNING: not as it was before the session", "initrd has changed")
    kinds = [json.loads(line)["kind"] for line in home("logs", session_id, "--json").stdout.splitlines()]
    assert kinds[-2:] == ["baseline.differs", "session.closed"]
    refused(home("session", "--empty", "--", "true", status=125), "was changed after it was made")


def test_an_image_with_one_byte_changed_is_refused(other_home: Cli, guest: Guest) -> None:
    info, layout = guest.info, other_home.layout
    original = guest.cli.layout.images / info.image / info.image_digest[:16]
    layout.cache.unlink()
    shutil.copytree(guest.cli.layout.cache, layout.cache, symlinks=True, ignore=lambda *_: ["packages", "broker"])
    layout.images.unlink()
    (layout.images / info.image).mkdir(parents=True)
    copy = copied(original, layout.images / info.image / original.name)
    (copy.parent / "current").symlink_to(original.name)
    for kind in (("vmlinuz", "kernel"), ("initr",)):
        (victim,) = [path for path in copy.iterdir() if path.name.startswith(kind)]
        flip_byte(victim, 1000)
        refused(other_home("session", "--empty", "--", "true", status=125), victim.name, "not what the manifest says")
        flip_byte(victim, 1000)
    flip_byte(victim, 1000)
    refused(other_home("image", "verify", info.image, status=125), victim.name, "not what the manifest says")


def test_a_guest_that_panics_shows_its_last_words(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def without_root(plan: DomainPlan) -> str:
        return render_domain(dataclasses.replace(plan, other_cmdline="console=ttyS0 panic=-1 rdinit=/nonexistent"))

    monkeypatch.setattr(making, "render_domain", without_root)
    with pytest.raises(GuestError) as error:
        Sandbox.open(request=SessionRequest(allow_emulation=True, memory_mib=304), layout=cli.layout)
    assert "did not come up" in error.value.brief
    assert "Kernel panic" in error.value.details, error.value.details


def test_a_guest_that_never_comes_up_is_given_up(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def hanging(plan: DomainPlan) -> str:
        return render_domain(dataclasses.replace(plan, other_cmdline="console=ttyS0 panic=0 rdinit=/nonexistent"))

    monkeypatch.setattr(making, "render_domain", hanging)
    monkeypatch.setattr(making, "BOOT_DEADLINE", 4)
    with pytest.raises(GuestError) as error:
        Sandbox.open(request=SessionRequest(allow_emulation=True, memory_mib=304), layout=cli.layout)
    assert "within" in error.value.details or "did not answer" in error.value.details
    assert "--- the end of its console ---" in error.value.details


def test_stop_ends_the_others_where_one_is_not_there(fork: Callable[..., Guest]) -> None:
    guest = fork()
    done = guest.cli("stop", "absent", guest.name, "gone", status=125)
    assert b"'absent'" in done.stderr and b"'gone'" in done.stderr
    assert not guest.folder.path.exists()


@pytest.mark.parametrize("words", [["ghost"], ["--all"]])
def test_stop_removes_a_session_without_a_record(other_home: Cli, words: list[str]) -> None:
    ghost = other_home.layout.live / "ghost"
    (ghost / "vm-123456").mkdir(parents=True)
    assert b"no session named 'ghost'" in other_home("gc", status=1).stdout, "a person has to say so"
    other_home("stop", *words)
    assert not ghost.exists()
