"""Whoever begins a session, by the command line or from Python, is held to the same policies."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path

import pytest

from vmsandbox.errors import RefusedError
from vmsandbox.guest.ask import Question
from vmsandbox.monitor import Monitor
from vmsandbox.policy.merging.effective import effective_policy
from vmsandbox.policy.values import CommandsPolicy, Policy, ResourcesPolicy
from vmsandbox.session.asked import holding
from vmsandbox.session.asked.request import SessionRequest
from vmsandbox.session.live.asking import answered_by


@dataclasses.dataclass
class Files:
    organisation: Path
    user: Path


@pytest.fixture
def wider(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Files:
    """An organisation and a person, where the program looks for them."""
    files = Files(tmp_path / "organisation.yaml", tmp_path / "home/config/policy.yaml")
    monkeypatch.setattr(holding, "effective_policy", partial(effective_policy, organisation=files.organisation))
    monkeypatch.setenv("VMSANDBOX_HOME", str(tmp_path / "home"))
    files.user.parent.mkdir(parents=True)
    files.organisation.write_text("sandbox: {resources: {processes: 100}, commands: {denied: [curl]}}\n")
    files.organisation.chmod(0o644)
    files.user.write_text("sandbox: {resources: {output: 1M}}\n")
    return files


def test_a_policy_that_a_program_made_holds_within_the_others(wider: Files, tmp_path: Path) -> None:
    asked = SessionRequest(project=tmp_path)
    made = Policy(resources=ResourcesPolicy(processes=200, output=2 << 20, vcpus=1), commands=CommandsPolicy(("git",)))
    for named in (made, None):
        found = holding.held(asked, named, Monitor())
        assert found.held and found.policy.resources.processes == 100 and found.policy.resources.output == 1 << 20
    found = holding.held(asked, made, Monitor())
    assert found.policy.resources.vcpus == 1 and found.policy.commands.allowed == ("git",)
    assert [one.denied for one in found.policy.commands.within] == [("curl",)]
    # The same as its file, and the project's own is found.
    own = tmp_path / "own.yaml"
    own.write_text("sandbox: {resources: {processes: 200, output: 2M, vcpus: 1}, commands: {allowed: [git]}}\n")
    by_file = holding.held(asked, own, Monitor()).policy
    assert dataclasses.replace(by_file, source=None, outer=()) == dataclasses.replace(
        found.policy, source=None, outer=()
    )
    own.rename(tmp_path / ".vmsandbox.yaml")
    assert holding.held(asked, None, Monitor()).policy.resources == by_file.resources


def test_alone_it_is_what_it_is(tmp_path: Path) -> None:
    made = Policy(resources=ResourcesPolicy(processes=200), commands=CommandsPolicy(("git",)))
    assert effective_policy(None, organisation=tmp_path / "no", user=tmp_path / "no", given=made).policy == made


def test_a_host_that_demands_signatures_takes_none_that_a_program_made(wider: Files) -> None:
    wider.organisation.write_text("sandbox: {signed: {allowed_signers: /etc/hostname}}\n")
    wider.user.unlink()
    with pytest.raises(RefusedError, match="signed"):
        holding.held(SessionRequest(), Policy(image="x"), Monitor())
    holding.held(SessionRequest(), Policy(), Monitor())


def test_a_project_that_reaches_into_the_host_is_refused_from_python_too(wider: Files, tmp_path: Path) -> None:
    (tmp_path / ".vmsandbox.yaml").write_text("sandbox: {session: {environment: [SECRET]}}\n")
    with pytest.raises(RefusedError, match="nobody has named it"):
        holding.held(SessionRequest(project=tmp_path), None, Monitor())
    holding.held(SessionRequest(project=tmp_path), tmp_path / ".vmsandbox.yaml", Monitor())


def test_a_program_answers_in_the_place_of_a_person() -> None:
    question = Question(1, ("pip", "install", "x"), "/", "/usr/bin/pip", "pip *", 60.0)
    assert answered_by(None) is None
    for answer, said in ((True, "yes"), (False, "no")):
        person = answered_by(lambda asked, answer=answer: answer and asked.argv[0] == "pip")
        assert person is not None and person(question, lambda: True) == said
