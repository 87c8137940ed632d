"""What a guest is told of its network, who may ask for which mode, and what of the broker's events is written down."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import time
from pathlib import Path

import pytest
from cryptography import x509

from vmsandbox.egress.values import EgressEvent, EgressKind
from vmsandbox.errors import RefusedError, UserInputError, VmsandboxError
from vmsandbox.journal.chain import Journal
from vmsandbox.ledger.processes import process_started
from vmsandbox.paths import Layout
from vmsandbox.policy.values import NetworkPolicy, Policy
from vmsandbox.session.asked.request import SessionRequest
from vmsandbox.session.network import egress_log
from vmsandbox.session.network.authority import make_authority
from vmsandbox.session.network.egress_log import EgressLog, read_events
from vmsandbox.session.network.guest_settings import guest_network
from vmsandbox.session.network.host_addresses import own_addresses
from vmsandbox.session.network.keeper import end_keeper, keeper_is_alive
from vmsandbox.session.state.folder import SessionFolder
from vmsandbox.spec import NetworkMode

NASTY = "a \"b\" \\ $(c) 'd'"


def test_the_variables_survive_sshd_and_the_shell(tmp_path: Path) -> None:
    network = guest_network("CERT\n", "http://127.0.0.1:3128", {"TOKEN": NASTY}, {}, forwarded=True)
    [line, listen] = network["sshd"].splitlines()
    assert listen == "PermitListen 127.0.0.1:3128"
    # sshd's own quoting is that of a shell's double quotes, without expansion (sshd_config(5)).
    words = shlex.split(line)
    assert words[0] == "SetEnv" and f"TOKEN={NASTY}" in words
    assert "LANG=C.UTF-8" in words, "the first SetEnv is the only one that counts"
    assert {"https_proxy=http://127.0.0.1:3128", "HTTPS_PROXY=http://127.0.0.1:3128"} <= set(words)
    [profile] = [text for path, _mode, _owner, text in network["files"] if path.startswith("/etc/profile.d/")]
    (tmp_path / "p").write_text(profile)
    done = subprocess.run(["sh", "-c", f'. {tmp_path}/p; printf %s "$TOKEN"'], capture_output=True, check=True)
    assert done.stdout.decode() == NASTY


def test_a_card_needs_no_forwarded_port() -> None:
    network = guest_network("CERT\n", "http://10.1.2.1:3128", {}, {"/home/x/.a": "b"}, forwarded=False)
    assert "PermitListen" not in network["sshd"] and "http://10.1.2.1:3128" in network["sshd"]
    assert ["/home/x/.a", 0o600, 1000, "b"] in network["files"]
    assert len(json.dumps(network)) < 32 << 10, "the control port takes 64 KiB"


@pytest.mark.parametrize("more", [{"A B": "c"}, {"A": "b\nPermitListen any"}, {"": "x"}, {"A": "\u202e"}])
def test_a_variable_that_could_say_more_is_refused(more: dict[str, str]) -> None:
    with pytest.raises(UserInputError):
        guest_network("CERT", "http://127.0.0.1:3128", more, {}, forwarded=True)


@pytest.mark.parametrize(
    ("policy", "asked", "mode"),
    [
        (None, None, NetworkMode.NONE),
        ("none", None, NetworkMode.NONE),
        ("restricted", None, NetworkMode.PROXY),
        ("proxy", None, NetworkMode.PROXY),
        ("filtered", None, NetworkMode.FILTERED),
        (None, NetworkMode.PROXY, NetworkMode.PROXY),
        ("restricted", NetworkMode.FILTERED, NetworkMode.FILTERED),
        ("filtered", NetworkMode.PROXY, NetworkMode.PROXY),
        ("proxy", NetworkMode.NONE, NetworkMode.NONE),
        ("none", NetworkMode.PROXY, None),
        ("none", NetworkMode.FILTERED, None),
        ("proxy", NetworkMode.FILTERED, None),
    ],
)
def test_a_command_line_gets_no_more_than_the_policy_allows(
    policy: str | None, asked: NetworkMode | None, mode: NetworkMode | None
) -> None:
    request = SessionRequest(network=asked, policy=Policy(network=NetworkPolicy(mode=policy)))
    if mode is None:
        with pytest.raises(RefusedError) as refused:
            request.check()
        assert refused.value.exit_code == 126
    else:
        request.check()
        assert request.mode is mode


def test_learning_without_a_network_is_refused() -> None:
    with pytest.raises(UserInputError, match="--learn"):
        SessionRequest(learn=True).check()


def test_an_authority_signs_servers_and_nothing_else() -> None:
    one, two = make_authority("s-1"), make_authority("s-1")
    assert one.key != two.key
    certificate = x509.load_pem_x509_certificate(one.certificate.encode())
    constraints = certificate.extensions.get_extension_for_class(x509.BasicConstraints)
    assert constraints.critical and constraints.value.ca and constraints.value.path_length == 0
    assert (certificate.not_valid_after_utc - certificate.not_valid_before_utc).days <= 8
    make_authority("x" * 100)


def test_own_addresses(tmp_path: Path) -> None:
    assert "127.0.0.1" in own_addresses()
    assert own_addresses(tmp_path) == ()


# -- what is written down ----------------------------------------------------------------------------------


def refused(host: str, **more: object) -> EgressEvent:
    return EgressEvent(EgressKind.REFUSED, time.time(), host=host, port=443, rule="default-deny", reason="no", **more)  # type: ignore[arg-type]


def opened(folder: Path) -> tuple[EgressLog, list[EgressEvent]]:
    alerts: list[EgressEvent] = []
    return EgressLog(folder, Journal(folder / "events.jsonl"), alerts.append), alerts


def journal(folder: Path) -> list[tuple[str, dict[str, object]]]:
    return [(entry["kind"], entry["data"]) for entry in Journal(folder / "events.jsonl").read()]


def test_refusals_of_a_kind_are_counted(tmp_path: Path) -> None:
    log, _alerts = opened(tmp_path)
    for _ in range(500):
        log.take(refused("a.test"))
    log.take(refused("b.test"))
    log.close()
    found = [(data["host"], data["times"]) for kind, data in journal(tmp_path) if kind == "egress.refused"]
    assert found == [("a.test", 1), ("b.test", 1), ("a.test", 499)]
    assert len(list(read_events(tmp_path))) == 501
    assert journal(tmp_path)[-1][1]["refused"] == 501


def test_a_guest_that_asks_for_a_thousand_names_does_not_fill_the_journal(tmp_path: Path) -> None:
    log, _alerts = opened(tmp_path)
    for number in range(2000):
        log.take(refused(f"h{number}.test"))
    log.close()
    assert len(journal(tmp_path)) < egress_log.KINDS_OF_REFUSAL + 10
    times = [int(str(data["times"])) for kind, data in journal(tmp_path) if kind == "egress.refused"]
    assert sum(times) == 2000


def test_the_file_has_an_end_and_refusals_have_room_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(egress_log, "ROUTINE_BYTES", 4000)
    monkeypatch.setattr(egress_log, "ALL_BYTES", 6000)
    log, _alerts = opened(tmp_path)
    for _ in range(100):
        log.take(EgressEvent(EgressKind.ALLOWED, 1.0, host="a.test", port=443))
    assert (tmp_path / "egress.jsonl").stat().st_size <= 4000
    log.take(refused("late.test"))
    assert [event.host for event in read_events(tmp_path)][-1] == "late.test"
    for _ in range(100):
        log.take(refused("late.test"))
    log.close()
    assert (tmp_path / "egress.jsonl").stat().st_size <= 6000
    closed = journal(tmp_path)[-1][1]
    assert closed["allowed"] == 100 and int(str(closed["unkept"])) > 100


def test_alerts_and_the_brokers_end_are_told_at_once(tmp_path: Path) -> None:
    log, alerts = opened(tmp_path)
    more = {"what": "a canary", "where": "body"}
    log.take(EgressEvent(EgressKind.ALERT, 1.0, host="a.test", port=443, rule="dlp", reason="it holds", more=more))
    log.take(EgressEvent(EgressKind.FAILED, 2.0, rule="broker-ended", reason="the broker has ended"))
    assert [event.kind for event in alerts] == [EgressKind.ALERT, EgressKind.FAILED]
    assert [kind for kind, _data in journal(tmp_path)] == ["egress.alert", "egress.broken"]
    log.close()
    log.close()
    assert [kind for kind, _data in journal(tmp_path)].count("egress.closed") == 1


def test_a_damaged_line_is_left_out(tmp_path: Path) -> None:
    log, _alerts = opened(tmp_path)
    log.take(refused("a.test"))
    log.close()
    with (tmp_path / "egress.jsonl").open("ab") as file:
        file.write(b'{"kind": "refused"')
    assert [event.host for event in read_events(tmp_path)] == ["a.test"]


# -- the keeper's end --------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> SessionFolder:
    kinds = ("images", "templates", "live", "records", "run", "cache", "config")
    made = SessionFolder(Layout(**{kind: tmp_path / kind for kind in kinds}), "s")
    made.path.mkdir(parents=True)
    return made


def record(folder: SessionFolder, pid: int, started: int | None) -> None:
    (folder.path / "keeper.json").write_text(json.dumps({"pid": pid, "started": started}))


def test_a_keeper_is_ended_also_one_that_ignores_it(folder: SessionFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    assert keeper_is_alive(folder) is None
    end_keeper(folder)
    monkeypatch.setattr("vmsandbox.session.network.keeper.END_SECONDS", 0.5)
    deaf = subprocess.Popen(["sh", "-c", "trap '' TERM; echo; while :; do sleep 1; done"], stdout=subprocess.PIPE)
    assert deaf.stdout is not None
    deaf.stdout.readline()
    record(folder, deaf.pid, process_started(deaf.pid))
    assert keeper_is_alive(folder)
    end_keeper(folder)
    assert deaf.wait(5) == -signal.SIGKILL
    assert not keeper_is_alive(folder)
    end_keeper(folder)


def test_another_process_with_the_keepers_number_is_left_alone(folder: SessionFolder) -> None:
    other = subprocess.Popen(["sleep", "60"])
    record(folder, other.pid, 1)
    assert keeper_is_alive(folder) is False
    end_keeper(folder)
    assert other.poll() is None
    other.kill()
    other.wait()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"pid": "x", "started": 1}'])
def test_a_damaged_record_of_a_keeper_stops_nobody(folder: SessionFolder, text: str) -> None:
    (folder.path / "keeper.json").write_text(text)
    try:
        end_keeper(folder)
    except VmsandboxError as error:
        raise AssertionError from error
    assert os.path.exists(folder.path)
