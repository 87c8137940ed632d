"""Several sessions at the same moment: each works, none has anything of another, and one name is one session's."""

from __future__ import annotations

import os
import signal
import time
import uuid
from pathlib import Path

import pytest
from harness import Cli, ended, leftovers, wait_for

from vmsandbox.ledger.admission import reservations, waiting
from vmsandbox.ledger.book import Ledger
from vmsandbox.paths import Layout

AT_ONCE = 5
LOOK = "cat /etc/machine-id /proc/sys/kernel/random/boot_id; hostname; head -c 16 /dev/urandom | base64"


def test_all_work_and_share_nothing(cli: Cli) -> None:
    names = [f"once-{number}" for number in range(AT_ONCE)]
    started = [cli.start("start", "--empty", "--name", name) for name in names]
    try:
        for process in started:
            status, _, stderr = ended(process, 240)
            assert status == 0, stderr
        promised = {one.owner: one for one in reservations(Ledger.of(cli.layout))}
        infos = [cli.guest(name).info for name in names]
        assert {info.id for info in infos} <= set(promised)
        for info in infos:
            # Under emulation a guest has what it wrote and QEMU's cache; what it may come to have is more than that.
            assert 0 < promised[info.id].memory_used < promised[info.id].memory
        looked = [cli.guest(name).sh(LOOK).splitlines() for name in names]
        for lines in zip(*looked, strict=True):
            assert len(set(lines)) == AT_ONCE, lines
        assert len({info.uuid for info in infos}) == len({cli.guest(name).qemu for name in names}) == AT_ONCE
        assert len({cli.guest(name).folder.keys() for name in names}) == AT_ONCE
        assert len({cli.guest(name).folder.run for name in names}) == AT_ONCE
    finally:
        cli("stop", *names, status=None)
    left = {row.session for row in Ledger.of(cli.layout).rows()}
    assert not left & {info.id for info in infos}


def test_the_same_name_twice_is_one_clean_refusal(cli: Cli) -> None:
    name = f"twice-{uuid.uuid4().hex[:6]}"
    ends = [ended(process, 240) for process in [cli.start("start", "--empty", "--name", name) for _ in range(2)]]
    try:
        assert sorted(status for status, _, _ in ends) == [0, 125]
        (refused,) = [stderr for status, _, stderr in ends if status == 125]
        assert b"exists already" in refused and b"Traceback" not in refused
        assert cli.guest(name).sh("echo here") == "here"
        owners = [one.owner for one in reservations(Ledger.of(cli.layout)) if name in one.label]
        assert owners == [cli.guest(name).info.id], "the one that was refused has given its room back"
    finally:
        cli("stop", name, status=None)


def test_a_template_that_many_need_is_made_once(cli: Cli, tmp_path: Path) -> None:
    policy = tmp_path / "sandbox.yaml"
    policy.write_text(f"sandbox: {{filesystem: {{tmpfs: [{{path: /mnt/{uuid.uuid4().hex}, size: 1M}}]}}}}\n")
    before = set(cli.layout.templates.glob("[0-9a-f]*"))
    words = ("session", "--empty", "--policy", policy, "--", "true")
    ends = [ended(process, 300) for process in [cli.start(*words) for _ in range(4)]]
    assert [status for status, _, _ in ends] == [0] * 4, ends
    said = [stderr.decode() for _, _, stderr in ends]
    assert sum("first use of this policy" in text for text in said) == 1
    assert sum("another vmsandbox is making" in text for text in said) >= 1
    assert len(set(cli.layout.templates.glob("[0-9a-f]*")) - before) == 1


def test_who_waits_is_told_and_gets_room_or_leaves(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """A guest of nearly all memory that is free: a second one has to wait until it is gone."""
    before = leftovers(cli.home)
    ledger = Ledger.of(cli.layout)
    memory = _most_memory_mib(cli.layout)
    with ledger.transaction() as connection:
        values = ("somebody", "somebody", memory << 20, 0, _me(), "2026")
        connection.execute("INSERT OR REPLACE INTO reservations VALUES (?, ?, ?, ?, ?, ?)", values)
    try:
        refused = cli("session", "--empty", "--", "true", status=125)
        assert b"no room" in refused.stderr and b"reserved by somebody" in refused.stderr
        assert b"--wait" in refused.stderr
        quitting = cli.start("session", "--empty", "--wait", "--name", "quitting", "--", "true")
        wait_for(lambda: waiting(ledger) == ["quitting"], 60)
        staying = cli.start("session", "--empty", "--wait=200", "--name", "staying", "--", "echo", "served")
        wait_for(lambda: waiting(ledger) == ["quitting", "staying"], 60)
        assert b"waiting for room: quitting, staying" in cli("ls").stderr
        os.kill(quitting.pid, signal.SIGINT)
        assert ended(quitting)[0] == 130
        wait_for(lambda: waiting(ledger) == ["staying"], 20)
        assert leftovers(cli.home) == before, "who waits has nothing of the host"
        time.sleep(1)
        assert staying.poll() is None
    finally:
        with ledger.transaction() as connection:
            connection.execute("DELETE FROM reservations WHERE owner = 'somebody'")
    status, out, stderr = ended(staying, 240)
    assert status == 0 and out == b"served\n"
    assert b"waiting for room: 1 wait before it" in stderr and b"waiting for room on this host" in stderr


def _most_memory_mib(layout: Layout) -> int:
    from vmsandbox.ledger.admission import Room

    promised = sum(one.memory_open for one in reservations(Ledger.of(layout)))
    return (Room.of(layout.live).memory - promised >> 20) - 100


def _me() -> str:
    from vmsandbox.ledger.processes import Process

    return str(Process.here())
