"""A guest's clock is right again after its host slept, was set, or held the guest still."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
from harness import ended, wait_for
from rooted import RootedGuest

from vmsandbox.session.upkeep.freezing import freeze_guest

HOUR = 3600.0


@pytest.fixture(scope="module")
def rooted(make_rooted: Callable[..., RootedGuest]) -> RootedGuest:
    return make_rooted()


def let_the_host_have_slept(guest: RootedGuest) -> None:
    """What a host leaves that slept for an hour: a guest that is late, and a note of how the host's clocks were."""
    guest.root(f"date -s @$(( $(date +%s) - {HOUR:.0f} )) > /dev/null")
    note = guest.folder.path / "clock"
    note.write_text(repr(float(note.read_text()) - HOUR))


def lateness(guest: RootedGuest) -> float:
    """Seconds that its clock is behind; asked over a connection that stays, which mends nothing."""
    return time.time() - float(guest.root("date +%s.%N"))


def jumps(guest: RootedGuest) -> list[float]:
    return [event["data"]["jump"] for event in guest.journal() if event["kind"] == "guest.clock"]


def test_the_next_command_finds_the_clock_right(rooted: RootedGuest) -> None:
    before = len(jumps(rooted))
    let_the_host_have_slept(rooted)
    assert lateness(rooted) > HOUR - 60, "it is not behind"
    said = float(rooted.exec("date", "+%s.%N").stdout)
    assert abs(time.time() - said) < 10
    assert [round(jump / HOUR) for jump in jumps(rooted)[before:]] == [1], "told once"
    rooted.exec("true")
    assert len(jumps(rooted)) == before + 1


def test_a_command_of_hours_sees_the_clock_mended_while_it_runs(rooted: RootedGuest) -> None:
    running = rooted.cli.start("exec", rooted.name, "--", "sleep", "600")
    wait_for(lambda: rooted.sh("pgrep -x sleep | wc -l") == "1", timeout=30, every=0.3)
    let_the_host_have_slept(rooted)
    wait_for(lambda: abs(lateness(rooted)) < 10, timeout=30, every=0.5)
    running.kill()
    ended(running)
    rooted.sh("pkill -x sleep; true")


def test_a_guest_that_was_frozen_goes_on_at_the_hour_that_it_is(rooted: RootedGuest) -> None:
    lateness(rooted)
    freeze_guest(rooted.folder, rooted.info, by="person", reason="a test")
    time.sleep(5)
    rooted.cli("thaw", rooted.name)
    assert abs(lateness(rooted)) < 3
