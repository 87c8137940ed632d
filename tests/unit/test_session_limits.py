"""What of a policy's resources and session limits reaches a guest, and who is told what when one is met."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vmsandbox.errors import GuestError, RefusedError, UserInputError, VmsandboxError
from vmsandbox.hypervisor.isolation import Check, Isolation
from vmsandbox.journal import events
from vmsandbox.ledger.processes import process_started
from vmsandbox.monitor import Monitor
from vmsandbox.paths import Layout
from vmsandbox.policy.merging.consent import reaches_into_host
from vmsandbox.policy.values import Healthcheck, Policy, ResourcesPolicy, SessionPolicy
from vmsandbox.process import Programs
from vmsandbox.session.asked.request import SessionRequest
from vmsandbox.session.asked.sizes import disk_free_of, refuse_grade
from vmsandbox.session.asked.variables import guest_variables
from vmsandbox.session.live.limits import LimitReachedError, Meter, ended_by_limit, limited
from vmsandbox.session.live.teardown import tear_down
from vmsandbox.session.network.guest_settings import guest_environment, guest_network
from vmsandbox.session.state.activity import activity_file
from vmsandbox.session.state.background import background_is_alive
from vmsandbox.session.state.folder import SessionFolder
from vmsandbox.session.state.info import SessionInfo, new_session_id
from vmsandbox.session.upkeep.balloon import Balloon, share_available
from vmsandbox.session.upkeep.freezing import forget_frozen
from vmsandbox.session.upkeep.health import Health
from vmsandbox.session.upkeep.watching import KIND, end_watcher, start_watcher
from vmsandbox.spec import Grade, GuestLimits

MIB = 1 << 20
SOURCE = Path("/p/.claude/sandbox.yaml")


# -- sizes -------------------------------------------------------------------------------------------------


def request(resources: ResourcesPolicy | None = None, image: str | None = None, **asked: Any) -> SessionRequest:
    policy = Policy(image=image, resources=resources or ResourcesPolicy(), source=SOURCE)
    return SessionRequest(policy=policy, **asked)


def test_nothing_said_is_the_default_and_the_policys_value_counts() -> None:
    plain = request().sizes
    assert (plain.image, plain.vcpus, plain.memory_mib, plain.limits) == ("base", 2, 512, GuestLimits())
    full = ResourcesPolicy(vcpus=4, memory=2 << 30, memory_reserved=512 * MIB, disk=(1 << 30) + 7, write_rate=50 * MIB)
    sizes = request(full, image="python-dev").sizes
    assert (sizes.image, sizes.vcpus, sizes.memory_mib) == ("python-dev", 4, 2048)
    assert sizes.limits == GuestLimits(1 << 30, 50 * MIB, 512), "QEMU counts a file in sectors of 512 bytes"


def test_an_option_narrows_and_never_widens() -> None:
    resources = ResourcesPolicy(vcpus=4, memory=2 << 30)
    narrow = request(resources, memory_mib=1024, vcpus=1).sizes
    assert (narrow.memory_mib, narrow.vcpus) == (1024, 1)
    for asked, key in (({"memory_mib": 4096}, "resources.memory"), ({"vcpus": 5}, "resources.vcpus")):
        with pytest.raises(RefusedError) as refused:
            request(resources, **asked).check()
        assert refused.value.exit_code == 126
        assert f"sandbox.{key} ({SOURCE})" in refused.value.details
    policy = Policy(image="base", source=SOURCE)
    assert SessionRequest(policy=policy, image="base").sizes.image == "base"
    with pytest.raises(RefusedError, match="image 'base'"):
        SessionRequest(policy=policy, image="other").check()


@pytest.mark.parametrize(
    ("resources", "key"),
    [
        (ResourcesPolicy(memory=255 * MIB), "memory"),
        (ResourcesPolicy(vcpus=0), "vcpus"),
        (ResourcesPolicy(vcpus=65), "vcpus"),
        (ResourcesPolicy(disk=63 * MIB), "disk"),
        (ResourcesPolicy(write_rate=1000), "write_rate"),
        (ResourcesPolicy(memory_reserved=100 * MIB), "memory_reserved"),
    ],
)
def test_what_no_guest_can_have_is_named(resources: ResourcesPolicy, key: str) -> None:
    with pytest.raises(UserInputError, match=f"sandbox.resources.{key} "):
        request(resources).check()


def test_a_reservation_of_all_memory_needs_no_balloon() -> None:
    resources = ResourcesPolicy(memory=512 * MIB, memory_reserved=512 * MIB)
    assert request(resources).sizes.limits.memory_reserved_mib is None
    assert request(replace(resources, memory=600 * MIB)).sizes.limits.memory_reserved_mib == 512
    assert request(replace(resources, memory=600 * MIB), memory_mib=300).sizes.limits.memory_reserved_mib is None


def test_the_file_system_is_full_before_its_disk_is() -> None:
    assert disk_free_of(GuestLimits()) is None
    for disk in (64 * MIB, 1 << 30, 1 << 40):
        free = disk_free_of(GuestLimits(disk))
        assert free is not None and disk * 0.3 < free < disk * 0.9


def test_memory_is_taken_back_while_the_host_is_short_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[int] = []
    monkeypatch.setattr(Balloon, "_set", lambda _self, mib: told.append(mib))
    balloon = Balloon("uuid", 1024, 512, tmp_path / "meminfo")
    for available in (900, 150, 99, 50, 150, 199, 201, 900):
        (tmp_path / "meminfo").write_text(f"MemTotal: 1000 kB\nMemAvailable: {available} kB\n")
        balloon.look()
    assert told == [512, 1024]
    for broken in ("", "MemTotal: 0 kB\nMemAvailable: 0 kB", "x", "MemTotal: y"):
        assert share_available(broken) == 1.0


@pytest.mark.parametrize("wanted", [None, "emulated", "separated", "isolated"])
@pytest.mark.parametrize("grade", list(Grade))
def test_the_least_grade(wanted: str | None, grade: Grade) -> None:
    isolation = Isolation(grade, {"kvm_used": Check(False, "domain type qemu")})
    order = ["emulated", "separated", "isolated"]
    if wanted is None or order.index(grade.value) >= order.index(wanted):
        refuse_grade(Policy(isolation=wanted), isolation)
        return
    with pytest.raises(RefusedError) as refused:
        refuse_grade(Policy(isolation=wanted, source=SOURCE), isolation)
    assert f"sandbox.isolation: {wanted} ({SOURCE})" in refused.value.details
    assert "domain type qemu" in refused.value.details


def test_a_watcher_needs_a_port() -> None:
    for session in (SessionPolicy(time=1), SessionPolicy(idle=1), SessionPolicy(healthcheck=Healthcheck(("true",)))):
        with pytest.raises(UserInputError, match="one SSH port"):
            SessionRequest(policy=Policy(session=session), ssh_ports=1).check()
    SessionRequest(policy=Policy(), ssh_ports=1).check()


# -- variables ---------------------------------------------------------------------------------------------


def variables(*names: str, host: dict[str, str] | None = None, **own: str) -> dict[str, str]:
    session = SessionPolicy(environment=names, variables=tuple(own.items()))
    return guest_variables(Policy(session=session, source=SOURCE), host or {})


def test_only_what_is_named_passes() -> None:
    host = {"LANG": "de_DE.UTF-8", "AWS_SECRET_ACCESS_KEY": "hunter2", "EDITOR": "ed"}
    assert variables("LANG", "NOT_THERE", host=host, NAME="a b") == {"LANG": "de_DE.UTF-8", "NAME": "a b"}
    assert variables("EDITOR", host=host, EDITOR="vi") == {"EDITOR": "vi"}, "a value of the policy's own outweighs"


@pytest.mark.parametrize(
    "name", ["A B", "", "1A", "A=B", "LD_PRELOAD", "BASH_ENV", "ENV", "VMSANDBOX_PLUMBING", "BASH_FUNC_x%%", "Ä"]
)
def test_names_that_may_not_be(name: str) -> None:
    with pytest.raises(UserInputError, match=r"sandbox\.session\.variables"):
        variables(**{name: "x"})
    with pytest.raises(UserInputError, match=r"sandbox\.session\.environment\[0\]"):
        variables(name, host={name: "x"})


@pytest.mark.parametrize("value", ["a\nPermitListen any", "\x1b[0m", "\u202e", "a\0b", "x" * (17 << 10)])
def test_values_that_may_not_be(value: str) -> None:
    with pytest.raises(UserInputError):
        variables(A=value)
    with pytest.raises(UserInputError):
        variables("A", host={"A": value})


def test_the_chosen_locale_is_not_outweighed() -> None:
    assert guest_environment({"A": "b"})["sshd"] == 'SetEnv "LANG=C.UTF-8" "LC_ALL=C.UTF-8" "A=b"\n'
    assert guest_environment({"LANG": "de_DE.UTF-8"})["sshd"] == 'SetEnv "LANG=de_DE.UTF-8" "LC_ALL=C.UTF-8"\n'
    assert guest_environment({"LC_TIME": "C"})["sshd"] == 'SetEnv "LANG=C.UTF-8" "LC_TIME=C"\n'
    chosen = {"LC_TIME": "C", "https_proxy": "http://elsewhere"}
    network = guest_network("CERT", "http://127.0.0.1:3128", {}, {}, forwarded=True, chosen=chosen)
    assert "LC_ALL" not in network["sshd"] and "elsewhere" not in network["sshd"]
    with pytest.raises(UserInputError, match="placeholder"):
        guest_network("CERT", "http://127.0.0.1:3128", {"KEY": "p"}, {}, forwarded=True, chosen={"KEY": "v"})


def test_what_of_the_host_a_person_has_to_name() -> None:
    named = Policy(session=SessionPolicy(environment=("LANG", "LC_TIME", "TZ", "GITHUB_TOKEN", "LANGX")))
    asked = reaches_into_host(named, network=False)
    assert asked == ["session.environment[3]: the host's GITHUB_TOKEN", "session.environment[4]: the host's LANGX"]


# -- output ------------------------------------------------------------------------------------------------


def info_of(name: str = "s", **more: Any) -> SessionInfo:
    return SessionInfo(
        id=new_session_id(name), name=name, uuid="00000000-1111-4222-8333-444444444444", domain="vmsandbox-s",
        created="", owner_pid=0, owner_started=0, image="base", image_digest="", template="", ssh_ports=2,
        memory_mib=256, vcpus=1, ready=True, **more,
    )  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> SessionFolder:
    kinds = ("images", "templates", "live", "records", "run", "cache", "config")
    return SessionFolder(Layout(**{kind: tmp_path / kind for kind in kinds}), "s")


def a_sandbox(folder: SessionFolder, **more: Any) -> Any:
    info = info_of(**more)
    folder.claim(info)
    return SimpleNamespace(folder=folder, info=info, journal=folder.journal(info.id), monitor=Monitor())


def test_output_up_to_the_limit_and_not_a_byte_more(folder: SessionFolder) -> None:
    sandbox = a_sandbox(folder, output_bytes=10)
    meter, got = Meter(sandbox), bytearray()
    out, err = meter.sink(got.extend), meter.sink(got.extend)
    out(b"12345")
    err(b"67890")
    with pytest.raises(LimitReachedError) as reached:
        out(b"abc")
    assert got == b"1234567890"
    assert reached.value.exit_code == 153 and "resources.output: 10 bytes" in reached.value.details
    assert sandbox.journal.read()[-1]["data"] == {"limit": "output", "value": 10}
    assert ended_by_limit(folder, sandbox.info) is None, "it has ended a command, and no session"
    unlimited = Meter(a_sandbox(SessionFolder(folder.layout, "t"))).sink(got.extend)
    unlimited(bytes(1 << 20))


def test_a_session_that_was_ended_by_a_limit_says_so(folder: SessionFolder) -> None:
    sandbox = a_sandbox(folder)
    with pytest.raises(GuestError), limited(sandbox):
        raise GuestError("the connection broke")
    sandbox.journal.append(events.LimitReached("idle", 5))
    with pytest.raises(LimitReachedError) as reached, limited(sandbox):
        raise GuestError("the connection broke")
    assert (reached.value.exit_code, reached.value.limit, reached.value.resolution) == (124, "idle", "")
    (folder.record_folder(sandbox.info.id) / "quarantine").mkdir()
    told = ended_by_limit(folder, sandbox.info)
    assert told is not None and f"vmsandbox accept {sandbox.info.id}" in told.resolution


# -- the watcher, with a process that stands for the guest -------------------------------------------------


@pytest.fixture
def guest_process(folder: SessionFolder) -> Any:
    """A process that has the session's UUID on its command line, as QEMU has."""
    info = info_of()
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)", info.uuid])
    folder.claim(info)
    folder.journal(info.id).append(events.GuestThawed())
    folder.pid_file(info).write_text(str(process.pid))
    yield process, info
    process.kill()
    process.wait()


def limits_of(folder: SessionFolder, info: SessionInfo) -> list[tuple[str, float]]:
    entries = folder.journal(info.id).read()
    return [(e["data"]["limit"], e["data"]["value"]) for e in entries if e["kind"] == "session.limit"]


def test_the_time_of_a_session_that_stays(folder: SessionFolder, guest_process: Any) -> None:
    process, info = guest_process
    start_watcher(folder, info, SessionPolicy(time=1), Programs())
    assert process.wait(30) == -signal.SIGKILL
    until = time.monotonic() + 10
    while folder.path.exists():
        assert time.monotonic() < until, (folder.path / "watcher.log").read_text()
        time.sleep(0.05)
    assert limits_of(folder, info) == [("time", 1)]
    until = time.monotonic() + 5
    while folder.journal(info.id).read()[-1]["kind"] != "session.closed":
        assert time.monotonic() < until
        time.sleep(0.05)


def test_only_the_guest_that_is_gone_is_not_frozen_any_more(folder: SessionFolder) -> None:
    gone = info_of()
    folder.claim(gone)
    mark = folder.path / "frozen"
    for text, stays in (
        ('{"uuid": "of-another"}', True),
        (f'{{"uuid": "{gone.uuid}"}}', False),
        ('{"by": "x"}', False),
    ):
        mark.write_text(text)
        forget_frozen(folder, gone)
        assert mark.exists() == stays


def test_a_limit_that_cannot_be_written_down_ends_the_session_too(folder: SessionFolder, guest_process: Any) -> None:
    process, info = guest_process
    journal = folder.record_folder(info.id) / "events.jsonl"
    journal.unlink()
    journal.mkdir()
    start_watcher(folder, info, SessionPolicy(time=1), Programs())
    assert process.wait(30) == -signal.SIGKILL


def test_idle_is_from_the_last_thing_that_was_done_and_not_while_frozen(
    folder: SessionFolder, guest_process: Any
) -> None:
    process, info = guest_process
    (folder.path / "frozen").write_text("{}")
    start_watcher(folder, info, SessionPolicy(idle=1.5), Programs())
    time.sleep(3)
    assert process.poll() is None
    (folder.path / "frozen").unlink()
    for _ in range(8):
        os.utime(activity_file(folder))
        time.sleep(0.4)
    assert process.poll() is None
    assert process.wait(15) == -signal.SIGKILL
    assert limits_of(folder, info) == [("idle", 1.5)]


def test_an_owner_keeps_its_folder_and_a_stop_ends_the_watcher(folder: SessionFolder, guest_process: Any) -> None:
    process, info = guest_process
    folder.update(replace(info, owner_pid=os.getpid(), owner_started=process_started(os.getpid()) or 0))
    start_watcher(folder, info, SessionPolicy(time=1), Programs())
    assert process.wait(30) == -signal.SIGKILL
    end_watcher(folder, finish=True)
    assert folder.path.exists() and not background_is_alive(folder, KIND)
    assert tear_down(folder.layout, folder, info) == []
    assert not folder.path.exists()


def test_a_name_that_is_used_again_is_another_session(folder: SessionFolder, guest_process: Any) -> None:
    process, info = guest_process
    old = replace(info, id=new_session_id("s"))
    start_watcher(folder, old, SessionPolicy(time=0.5), Programs())
    until = time.monotonic() + 10
    while background_is_alive(folder, KIND) and time.monotonic() < until:
        time.sleep(0.05)
    assert not background_is_alive(folder, KIND), "it has nothing to watch"
    assert tear_down(folder.layout, folder, old) == []
    assert process.poll() is None and folder.path.exists() and limits_of(folder, info) == []


def test_a_stop_does_not_wait_for_the_time(folder: SessionFolder, guest_process: Any) -> None:
    process, info = guest_process
    start_watcher(folder, info, SessionPolicy(time=3600, idle=3600), Programs())
    watcher = json.loads((folder.path / f"{KIND}.json").read_text())
    began = time.monotonic()
    assert tear_down(folder.layout, folder, info) == []
    assert process_started(watcher["pid"]) != watcher["started"], "it was ended before what it works on"
    assert process.wait(5) == -signal.SIGKILL and time.monotonic() - began < 6
    assert limits_of(folder, info) == []


# -- the health check's events -----------------------------------------------------------------------------


class Scripted(Health):
    """A health check whose runs have these outcomes."""

    def __init__(self, folder: SessionFolder, session_id: str, outcomes: list[int | VmsandboxError | None]) -> None:
        super().__init__(folder, session_id, Healthcheck(("x",), interval=0.001, retries=3))
        self.outcomes = outcomes

    def _test(self) -> tuple[int | None, bytes]:
        if len(self.outcomes) == 1:
            self._ending.set()
        outcome = self.outcomes.pop(0)
        if isinstance(outcome, VmsandboxError):
            raise outcome
        return outcome, b"\x1b]0;bad\x07" * 1000


def test_failures_are_events_until_it_is_unhealthy_and_then_only_the_change(folder: SessionFolder) -> None:
    sandbox = a_sandbox(folder)
    outcomes: list[int | VmsandboxError | None] = [0, 1, None, 0, 1, 1, GuestError("no login"), 1, 1, 0, 0]
    Scripted(folder, sandbox.info.id, outcomes).run()
    noted = [(e["kind"], e["data"].get("state") or e["data"]["failures"]) for e in sandbox.journal.read()]
    # the last outcome falls into the end, and is not counted
    assert noted == [
        ("health.changed", "healthy"), ("health.failed", 1), ("health.failed", 2),
        ("health.failed", 1), ("health.failed", 2), ("health.failed", 3), ("health.changed", "unhealthy"),
        ("health.changed", "healthy"),
    ]  # fmt: skip
    assert json.loads((folder.path / "health.json").read_text())["state"] == "healthy"
    text = (folder.record_folder(sandbox.info.id) / "events.jsonl").read_text()
    assert "\\u001b" not in text and len(text) < 20_000
