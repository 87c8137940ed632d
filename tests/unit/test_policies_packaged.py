"""The ready-made policies: what each of them comes to, all values written out, and what its guest is told."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from vmsandbox.errors import UserInputError
from vmsandbox.policy.format.rendering import plain_policy, to_yaml
from vmsandbox.policy.load import load_policy
from vmsandbox.policy.packaged import packaged_names, packaged_policy
from vmsandbox.policy.values import Policy
from vmsandbox.render.confinement import confinement_of

NAMES = ("agent", "offline", "python-dev", "review-only")


def test_these_are_shipped() -> None:
    assert packaged_names() == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_what_it_comes_to(name: str, golden: Callable[[str, str], None]) -> None:
    policy = load_policy(Path(name))
    golden(f"policies/{name}.yaml", to_yaml(plain_policy(policy, complete=True)))


@pytest.mark.parametrize("name", NAMES)
def test_it_never_needs_more_than_the_default_allows(name: str) -> None:
    policy = load_policy(Path(name))
    assert policy.kernel == Policy().kernel, "the kernel's surface stays as small as it can be"
    assert "*" not in policy.network.allowed_hosts and policy.network.mode in ("none", "restricted")
    assert policy.returns.accept == "safe" and policy.resources.processes and policy.session.time


def test_a_file_in_somebodys_folder_does_not_take_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("offline").write_text("sandbox: {session: {environment: [SECRET]}}\n")
    assert packaged_policy(Path("offline")).name == "offline.yaml"
    assert load_policy(Path("offline")).session.environment == ()
    assert load_policy(tmp_path / "offline").session.environment == ("SECRET",)
    Path("mine").write_text("sandbox: {}\n")
    assert load_policy(Path("mine")) == Policy(source=Path("mine"))
    os.symlink("nowhere", "dangling")
    with pytest.raises(UserInputError, match="cannot be read"):
        load_policy(Path("dangling"))


def test_an_unknown_name_says_which_there_are() -> None:
    with pytest.raises(UserInputError) as error:
        load_policy(Path("ofline"))
    assert "agent, offline, python-dev, review-only" in error.value.details
    for path in ("./a/ofline", "ofline.yaml", "../offline"):
        with pytest.raises(UserInputError, match="cannot be read"):
            load_policy(Path(path))


@pytest.mark.parametrize("name", NAMES)
def test_what_its_guest_is_told(name: str, golden: Callable[[str, str], None]) -> None:
    message = confinement_of(load_policy(Path(name)))
    golden(f"policies/{name}.json", json.dumps(message, indent=1) + "\n")
