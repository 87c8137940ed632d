"""The doctor, on folders that look like hosts and on the host that runs the tests."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import pytest

from vmsandbox.errors import HostError
from vmsandbox.hypervisor.kvm import KvmProof
from vmsandbox.monitor import Monitor
from vmsandbox.paths import Layout
from vmsandbox.process import Finished, Programs
from vmsandbox.session.checks import CheckResult, Examined, Status
from vmsandbox.session.checks import virtualization as virtualization_module
from vmsandbox.session.checks.confinement import APPARMOR_RULES, apparmor_rules, check_confinement
from vmsandbox.session.checks.programs import check_programs
from vmsandbox.session.checks.resources import check_resources
from vmsandbox.session.checks.virtualization import check_kvm_device, check_libvirt
from vmsandbox.session.doctor import Diagnosis, Mended, diagnose, mend
from vmsandbox.spec import Grade

WORKS = KvmProof(True, "the test guest ran", 0.2, False)
FAILS = KvmProof(False, "the test guest did not run", 3.0, True)
ALL_PROGRAMS = (
    "qemu-system-x86_64", "qemu-img", "libvirtd", "virtlogd", "mmdebstrap", "mke2fs", "ssh", "scp",
    "ssh-keygen", "nft", "ebtables", "ip", "unshare", "newuidmap", "apt-get", "systemctl", "dnsmasq",
)  # fmt: skip


class RecordedPrograms(Programs):
    """Programs of which only some are installed; runs are recorded, apt-get installs nothing."""

    def __init__(self, *missing: str, version: str = "QEMU emulator version 8.2.1 (Debian)") -> None:
        self.missing = set(missing)
        self.version = version
        self.ran: list[list[str]] = []
        self.fails: dict[str, int] = {}

    def find(self, name: str) -> str | None:
        return f"/usr/bin/{name}" if name in ALL_PROGRAMS and name not in self.missing else None

    def run(
        self,
        argv: Sequence[str | Path],
        *,
        timeout: float = 60,
        check: bool = True,
        stdin: bytes | None = None,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        on_line: Callable[[str], None] | None = None,
    ) -> Finished:
        words = [str(word) for word in argv]
        self.ran.append(words)
        status = 1 if self.fails.get(words[0], 0) > 0 else 0
        self.fails[words[0]] = self.fails.get(words[0], 0) - 1
        if status and check:
            raise HostError(f"{words[0]} failed")
        return Finished(tuple(words), status, self.version.encode(), b"")


@dataclass
class FakeLibvirt:
    """What the doctor asks of a connection."""

    libvirt_version: tuple[int, int, int] = (9, 0, 0)
    qemu_user: tuple[int, int] | None = (64055, 64055)
    closed: bool = False

    def close(self) -> None:
        self.closed = True


class RecordingMonitor(Monitor):
    def __init__(self) -> None:
        self.said: list[str] = []

    def notice(self, text: str) -> None:
        self.said.append(text)

    def warning(self, text: str) -> None:
        self.said.append(f"warning: {text}")


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return Layout(**{field.name: tmp_path / "home" / field.name for field in fields(Layout)})


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A healthy Debian host with AppArmor and systemd (but without our rules)."""
    root = tmp_path / "root"
    write(root, "/proc/meminfo", "MemTotal: 9999999 kB\nMemAvailable: 8000000 kB\n")
    write(root, "/sys/module/apparmor/parameters/enabled", "Y\n")
    write(root, "/etc/apparmor.d/libvirt/TEMPLATE.qemu", "")
    for folder in ("/run/systemd/system", "/sys/module/tun", "/sys/module/bridge", "/sys/module/nf_tables"):
        (root / folder[1:]).mkdir(parents=True)
    write(root, "/dev/kvm", "").chmod(0o666)
    return root


def write(root: Path, path: str, text: str) -> Path:
    file = root / path[1:]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    return file


def examined(
    layout: Layout, root: Path, programs: Programs | None = None, uri: str = "qemu:///system", uid: int = 0
) -> Examined:
    return Examined(layout, programs or RecordedPrograms(), uri, uid=uid, root=root, kernel="6.1.0")


def examine(layout: Layout, root: Path, **changes: Any) -> Diagnosis:
    options: dict[str, Any] = {
        "uri": "qemu:///system",
        "open_host": lambda uri: FakeLibvirt(),
        "kvm": WORKS,
        "root": root,
    }
    programs = changes.pop("programs", None) or RecordedPrograms()
    return diagnose(layout, programs, **{**options, **changes})


def by_id(checks: Sequence[CheckResult], check: str) -> CheckResult:
    return next(result for result in checks if result.id == check)


def with_rules(layout: Layout, root: Path) -> None:
    write(root, str(APPARMOR_RULES), "\n".join(apparmor_rules(layout)) + "\n")


# -- what follows from the checks --------------------------------------------------------------------------


def test_a_healthy_host_can_isolate(layout: Layout, root: Path) -> None:
    with_rules(layout, root)
    diagnosis = examine(layout, root)
    assert [check.id for check in diagnosis.checks if check.status is Status.FAIL] == []
    assert (diagnosis.can_run, diagnosis.grade, diagnosis.grade_reasons) == (True, Grade.ISOLATED, ())


def test_without_kvm_a_session_needs_leave_to_emulate(layout: Layout, root: Path) -> None:
    with_rules(layout, root)
    refused = examine(layout, root, kvm=FAILS)
    allowed = examine(layout, root, kvm=FAILS, allow_emulation=True)
    assert (refused.can_run, allowed.can_run) == (False, True)
    assert refused.grade is allowed.grade is Grade.EMULATED
    assert FAILS.reason in refused.grade_reasons[0]
    assert "--allow-emulation" in by_id(refused.checks, "kvm").remedy


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"uri": "qemu:///session"}, "qemu:///session"),
        ({"open_host": lambda uri: FakeLibvirt(qemu_user=(0, 0))}, "user of its own"),
        ({"open_host": lambda uri: FakeLibvirt(qemu_user=None)}, "user of its own"),
    ],
)
def test_each_missing_piece_lowers_the_grade_and_is_named(
    layout: Layout, root: Path, change: dict[str, Any], words: str
) -> None:
    with_rules(layout, root)
    diagnosis = examine(layout, root, **change)
    assert diagnosis.grade is Grade.SEPARATED
    assert len(diagnosis.grade_reasons) == 1
    assert words in diagnosis.grade_reasons[0]


def test_without_mandatory_access_control_it_is_separated(layout: Layout, root: Path) -> None:
    write(root, "/sys/module/apparmor/parameters/enabled", "N\n")
    diagnosis = examine(layout, root)
    assert (diagnosis.can_run, diagnosis.grade) == (True, Grade.SEPARATED)
    assert "AppArmor" in diagnosis.grade_reasons[0]


@pytest.mark.parametrize("missing", ["qemu-system-x86_64", "libvirtd"])
def test_without_qemu_or_libvirt_there_is_no_grade(layout: Layout, root: Path, missing: str) -> None:
    diagnosis = examine(layout, root, programs=RecordedPrograms(missing))
    assert (diagnosis.can_run, diagnosis.grade) == (False, None)


def test_json_has_everything_but_the_functions(layout: Layout, root: Path) -> None:
    data = json.loads(json.dumps(examine(layout, root).as_json()))
    assert data["can_run"] is False
    confinement = next(check for check in data["checks"] if check["id"] == "confinement")
    assert confinement["status"] == "fail"
    assert confinement["fixable"] is (os.geteuid() == 0)
    assert all(set(check) == set(confinement) for check in data["checks"])


def test_every_bad_check_says_what_to_do(layout: Layout, tmp_path: Path) -> None:
    def refuse(uri: str) -> FakeLibvirt:
        raise HostError("no answer")

    diagnosis = examine(
        layout, tmp_path / "empty", programs=RecordedPrograms(*ALL_PROGRAMS), kvm=FAILS, open_host=refuse
    )
    bad = [check for check in diagnosis.checks if check.status is not Status.OK]
    assert len(bad) >= 7
    assert [check.id for check in bad if not check.remedy and check.id != "memory"] == []


# -- single checks -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "status"),
    [
        ("QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18)", Status.OK),
        ("QEMU emulator version 10.0.2", Status.OK),
        ("QEMU emulator version 7.1.0", Status.FAIL),
        ("QEMU emulator version 2.11.1", Status.FAIL),
        ("something else", Status.FAIL),
    ],
)
def test_qemus_version(layout: Layout, root: Path, said: str, status: Status) -> None:
    checks = check_programs(examined(layout, root, RecordedPrograms(version=said)))
    assert by_id(checks, "qemu").status is status


def test_the_image_builder_is_only_needed_without_an_image(layout: Layout, root: Path) -> None:
    host = examined(layout, root, RecordedPrograms("mmdebstrap"))
    check = by_id(check_programs(host), "image-tools")
    assert (check.status, check.packages) == (Status.FAIL, ("mmdebstrap",))
    assert check.remedy == "sudo apt-get install --no-install-recommends mmdebstrap"
    (layout.images / "base").mkdir(parents=True)
    (layout.images / "base/current").symlink_to("0123")
    (layout.images / "base/0123").mkdir()
    assert by_id(check_programs(host), "image-tools").status is Status.WARN


@pytest.mark.parametrize(
    ("free", "status"), [(2.9, Status.FAIL), (3.1, Status.WARN), (5.9, Status.WARN), (6.1, Status.OK)]
)
def test_disk_space(layout: Layout, root: Path, monkeypatch: pytest.MonkeyPatch, free: float, status: Status) -> None:
    class Usage:
        f_bavail, f_frsize = int(free * 1024), 1 << 20

    monkeypatch.setattr(os, "statvfs", lambda path: Usage)
    assert by_id(check_resources(examined(layout, root)), "disk").status is status


@pytest.mark.parametrize(
    ("total", "free", "status"),
    [
        (4, 1151, Status.FAIL),
        (4, 1153, Status.WARN),
        (4, 1249, Status.OK),
        (40, 2687, Status.FAIL),
        (40, 2785, Status.OK),
    ],
)
def test_memory_is_enough_where_a_session_is_not_refused(
    layout: Layout, root: Path, total: int, free: int, status: Status
) -> None:
    """total: in GiB. free: in MiB."""
    write(root, "/proc/meminfo", f"MemTotal: {total << 20} kB\nMemFree: 1 kB\nMemAvailable: {free << 10} kB\n")
    assert by_id(check_resources(examined(layout, root)), "memory").status is status


def test_image_builds_of_a_user_name_each_obstacle(layout: Layout, root: Path) -> None:
    host = examined(layout, root, RecordedPrograms("newuidmap"), uid=4242)
    write(root, "/proc/sys/kernel/unprivileged_userns_clone", "0\n")
    check = by_id(check_resources(host), "user-namespaces")
    assert check.status is Status.WARN
    for word in ("/etc/subuid", "/etc/subgid", "newuidmap", "unprivileged_userns_clone"):
        assert word in check.found
    write(root, "/etc/subuid", "4242:100000:65536\n")
    write(root, "/etc/subgid", "4242:100000:65536\n")
    write(root, "/proc/sys/kernel/unprivileged_userns_clone", "1\n")
    good = by_id(check_resources(examined(layout, root, uid=4242)), "user-namespaces")
    assert good.status is Status.OK


def test_a_kernel_without_the_cards_features_only_warns(layout: Layout, root: Path) -> None:
    (root / "sys/module/bridge").rmdir()
    host = examined(layout, root, RecordedPrograms("nft"), uid=4242)
    check = by_id(check_resources(host), "filtered-card")
    assert check.status is Status.WARN
    assert "bridge" in check.found and "nftables" in check.found and "tun" not in check.found
    write(root, "/lib/modules/6.1.0/modules.dep", "kernel/net/bridge/bridge.ko.xz: kernel/net/802/stp.ko.xz\n")
    assert by_id(check_resources(examined(layout, root)), "filtered-card").status is Status.OK


def test_the_permissions_that_make_libvirt_probe_again(layout: Layout, root: Path) -> None:
    device = root / "dev/kvm"
    assert check_kvm_device(examined(layout, root)).status is Status.OK
    device.chmod(0o600)
    check = check_kvm_device(examined(layout, root))
    assert check.status is Status.WARN
    assert "sudo chgrp kvm /dev/kvm && sudo chmod 660 /dev/kvm" in check.remedy
    assert check_kvm_device(examined(layout, root, uid=4242)).fix is None
    if check.fix is not None and os.geteuid() == 0:  # there is a group kvm here
        check.fix()
        assert check_kvm_device(examined(layout, root)).status is Status.OK
    device.unlink()
    assert check_kvm_device(examined(layout, root)).status is Status.WARN


def test_apparmor_needs_our_rules_and_gets_them_once(layout: Layout, root: Path) -> None:
    programs = RecordedPrograms()
    write(root, str(APPARMOR_RULES), "# of the administrator\n/srv/x r,")
    check = check_confinement(examined(layout, root, programs))
    assert check.status is Status.FAIL
    for rule in apparmor_rules(layout):
        assert rule in check.remedy
    assert check.fix is not None
    check.fix()
    text = (root / str(APPARMOR_RULES)[1:]).read_text()
    assert text.startswith("# of the administrator\n/srv/x r,\n")
    assert ["systemctl", "reload", "apparmor"] in programs.ran
    assert check_confinement(examined(layout, root)).status is Status.OK
    assert check_confinement(examined(layout, root, uid=4242)).fix is None


def test_apparmors_patterns_in_a_path_are_escaped(layout: Layout) -> None:
    odd = replace(layout, live=Path('/srv/a"b*{c}'))
    assert '"/srv/a\\"b\\*\\{c\\}/**/ram" rw,' in apparmor_rules(odd)


def test_where_libvirt_does_not_use_apparmor_no_rule_is_needed(layout: Layout, root: Path) -> None:
    write(root, "/etc/libvirt/qemu.conf", '#security_driver = "selinux"\nsecurity_driver = "none"\n')
    check = check_confinement(examined(layout, root))
    assert check.status is Status.WARN
    assert check_confinement(examined(layout, root, uri="qemu:///session")).status is Status.OK


def test_selinux_gets_the_lines_to_type(layout: Layout, root: Path) -> None:
    write(root, "/sys/module/apparmor/parameters/enabled", "N")
    write(root, "/sys/fs/selinux/enforce", "1")
    check = check_confinement(examined(layout, root))
    assert check.status is Status.WARN
    assert f"restorecon -R '{layout.images}'" in check.remedy
    assert "semanage fcontext -a -t svirt_image_t" in check.remedy


# -- libvirt -----------------------------------------------------------------------------------------------


def refuse(uri: str) -> FakeLibvirt:
    raise HostError("libvirt does not answer", details=uri)


def test_libvirt_that_answers_is_closed_again(layout: Layout, root: Path) -> None:
    libvirt = FakeLibvirt()
    check, user = check_libvirt(examined(layout, root), lambda uri: libvirt)
    assert (check.status, user, libvirt.closed) == (Status.OK, (64055, 64055), True)
    old, _ = check_libvirt(examined(layout, root), lambda uri: FakeLibvirt(libvirt_version=(8, 0, 0)))
    assert old.status is Status.WARN


@pytest.mark.parametrize(
    ("systemd", "missing", "commands"),
    [
        (True, (), [["systemctl", "start", "libvirtd"]]),
        (False, (), [["virtlogd", "-d"], ["libvirtd", "-d"]]),
    ],
)
def test_the_daemon_is_started_as_this_host_does_it(
    layout: Layout, root: Path, systemd: bool, missing: tuple[str, ...], commands: list[list[str]]
) -> None:
    if not systemd:
        (root / "run/systemd/system").rmdir()
    programs = RecordedPrograms(*missing)
    check, _ = check_libvirt(examined(layout, root, programs), refuse)
    assert check.status is Status.FAIL and check.fix is not None
    check.fix()
    assert programs.ran == commands
    assert check_libvirt(examined(layout, root, uid=4242), refuse)[0].fix is None


def test_a_daemon_that_runs_is_not_started_twice(layout: Layout, root: Path) -> None:
    (root / "run/systemd/system").rmdir()
    write(root, "/run/virtlogd.pid", "77\n")
    write(root, "/proc/77/comm", "virtlogd\n")
    write(root, "/run/libvirtd.pid", "78\n")  # stale: the number is another program's now
    write(root, "/proc/78/comm", "sleep\n")
    check, _ = check_libvirt(examined(layout, root), refuse)
    assert check.remedy == "sudo libvirtd -d"


def test_a_daemon_that_hangs_does_not_hang_the_doctor(
    layout: Layout, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(virtualization_module, "ANSWER_DEADLINE", 0.1)

    def hang(uri: str) -> FakeLibvirt:
        time.sleep(1)
        return FakeLibvirt()

    started = time.monotonic()
    check, _ = check_libvirt(examined(layout, root), hang)
    assert time.monotonic() - started < 0.8
    assert check.status is Status.FAIL and "did not answer" in check.found


def test_missing_bindings_are_a_finding(layout: Layout, root: Path) -> None:
    def no_bindings(uri: str) -> FakeLibvirt:
        raise ImportError("No module named 'libvirt'")

    check, _ = check_libvirt(examined(layout, root), no_bindings)
    assert check.status is Status.FAIL and "bindings" in check.found


# -- mending -----------------------------------------------------------------------------------------------


def result(check: str, **more: Any) -> CheckResult:
    return CheckResult(check, check, more.pop("status", Status.FAIL), "found", "remedy", **more)


def only(*checks: CheckResult) -> Diagnosis:
    return Diagnosis(checks, None, ())


def test_mending_installs_exactly_what_is_missing_in_one_go() -> None:
    programs, monitor = RecordedPrograms(), RecordingMonitor()
    before = only(
        result("a", packages=("qemu-utils",)),
        result("b", packages=("mmdebstrap", "qemu-utils"), status=Status.WARN),
        result("c", packages=("not-needed",), status=Status.OK),
    )
    after, done = mend(before, programs, monitor, again=lambda: only(), uid=0)
    command = ["apt-get", "install", "-y", "-q", "--no-install-recommends", "mmdebstrap", "qemu-utils"]
    assert programs.ran == [command]
    assert after.can_run
    assert [item.id for item in done] == ["packages"]
    assert monitor.said == [done[0].done]


def test_outdated_package_lists_are_updated() -> None:
    programs = RecordedPrograms()
    programs.fails["apt-get"] = 1
    mend(only(result("a", packages=("x",))), programs, Monitor(), again=lambda: only(), uid=0)
    assert [words[1] for words in programs.ran] == ["install", "update", "install"]


@pytest.mark.parametrize(("uid", "missing"), [(4242, ()), (0, ("apt-get",))])
def test_nothing_is_installed_without_root_or_apt(uid: int, missing: tuple[str, ...]) -> None:
    programs = RecordedPrograms(*missing)
    before = only(result("a", packages=("x",)))
    after, done = mend(before, programs, Monitor(), again=lambda: only(), uid=uid)
    assert (after, done, programs.ran) == (before, (), [])


def test_what_a_first_round_makes_possible_is_done_in_the_next() -> None:
    diagnoses = [only(result("daemon", fix=lambda: "started")), only()]
    first = only(result("programs", packages=("x",)))
    after, done = mend(first, RecordedPrograms(), Monitor(), again=lambda: diagnoses.pop(0), uid=0)
    assert after == only()
    assert [item.id for item in done] == ["packages", "daemon"]


def test_a_fix_that_fails_is_told_and_not_repeated() -> None:
    calls = []

    def fail() -> str:
        calls.append(1)
        raise HostError("no", details="the evidence")

    monitor = RecordingMonitor()
    bad = only(result("a", fix=fail), result("b", fix=lambda: "did b"))
    after, done = mend(bad, RecordedPrograms(), monitor, again=lambda: bad, uid=0)
    assert len(calls) == 1
    assert not after.can_run
    assert done == (Mended("a", "", "no\nthe evidence"), Mended("b", "did b"))
    assert monitor.said == ["warning: a: no\nthe evidence", "did b"]


# -- the host that runs the tests --------------------------------------------------------------------------


def test_this_host_is_examined_and_nothing_stays(layout: Layout) -> None:
    def children() -> set[str]:
        with suppress(OSError):
            return set(Path(f"/proc/self/task/{os.getpid()}/children").read_text().split())
        return set()

    before = children()
    diagnose(layout, Programs(), allow_emulation=True)
    diagnosis = diagnose(layout, Programs(), allow_emulation=True)
    assert children() <= before
    assert len({check.id for check in diagnosis.checks}) == len(diagnosis.checks)
    assert json.dumps(diagnosis.as_json())
    if by_id(diagnosis.checks, "kvm").status is not Status.OK:
        assert diagnosis.grade in (Grade.EMULATED, None)
