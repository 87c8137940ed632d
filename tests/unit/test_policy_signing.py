"""Signed policies, with the real ssh-keygen: the bytes that are acted on are those that were signed."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from vmsandbox.errors import HostError, RefusedError, UserInputError
from vmsandbox.policy.layer import Layer
from vmsandbox.policy.load import load_layer
from vmsandbox.policy.merging import signing
from vmsandbox.policy.merging.effective import effective_policy
from vmsandbox.policy.merging.signing import sign, signature_of
from vmsandbox.policy.values import Policy
from vmsandbox.process import Programs

POLICY = "sandbox: {network: {mode: proxy, allowed_hosts: [a.org]}}\n"


def key(folder: Path, name: str) -> Path:
    path = folder / name
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", name, "-f", path], check=True)
    return path


class Place:
    """An organisation that demands signatures, its reviewer, somebody else, and a project with a policy."""

    def __init__(self, folder: Path) -> None:
        self.reviewer, self.other = key(folder, "reviewer"), key(folder, "other")
        self.signers = folder / "signers"
        public = self.reviewer.with_suffix(".pub").read_text()
        self.signers.write_text(f'reviewer@example.org namespaces="vmsandbox-policy" {public}')
        self.signers.chmod(0o644)
        self.organisation = folder / "organisation.yaml"
        self.demand(f"allowed_signers: {self.signers}")
        self.user = folder / "user.yaml"
        self.policy = folder / "sandbox.yaml"
        self.policy.write_text(POLICY)

    def demand(self, text: str) -> None:
        self.organisation.write_text(f"sandbox: {{signed: {{{text}}}}}\n")
        self.organisation.chmod(0o644)

    def read(self) -> Policy:
        return effective_policy(self.policy, organisation=self.organisation, user=self.user).policy

    def refused(self) -> RefusedError:
        with pytest.raises(RefusedError) as caught:
            self.read()
        assert caught.value.exit_code == 126
        return caught.value


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def test_a_policy_that_a_reviewer_signed_is_taken(place: Place) -> None:
    assert sign(place.policy, place.reviewer, Programs()) == [signature_of(place.policy)]
    assert place.read().network.allowed_hosts == ("a.org",)
    place.demand(f"allowed_signers: {place.signers}, principals: [nobody@example.org, reviewer@example.org]")
    assert place.read().network.mode == "proxy"
    assert (place.policy.parent / "sandbox.yaml.sig").stat().st_mode & 0o777 == 0o644


def test_no_signature_and_a_policy_that_changed(place: Place) -> None:
    assert "not signed" in place.refused().brief
    sign(place.policy, place.reviewer, Programs())
    for text in (POLICY + "\n", POLICY.replace("a.org", "b.org"), "sandbox: {}\n"):
        place.policy.write_text(text)
        assert "not signed" in place.refused().brief
    place.policy.write_text(POLICY)
    place.read()


def test_somebody_else_and_a_signature_for_something_else(place: Place) -> None:
    sign(place.policy, place.other, Programs())
    place.refused()
    done = subprocess.run(
        ["ssh-keygen", "-q", "-Y", "sign", "-n", "file", "-f", place.reviewer],
        input=POLICY.encode(), capture_output=True, check=True,
    )  # fmt: skip
    place.signers.write_text(f"reviewer@example.org {place.reviewer.with_suffix('.pub').read_text()}")
    signature_of(place.policy).write_bytes(done.stdout)
    place.refused()
    sign(place.policy, place.reviewer, Programs())
    place.read()
    place.demand(f"allowed_signers: {place.signers}, principals: [somebody@example.org]")
    place.refused()
    for content in (b"", b"-----BEGIN SSH SIGNATURE-----\n", b"x" * 100_000):
        signature_of(place.policy).write_bytes(content)
        place.refused()


def test_the_bytes_that_were_read_are_checked_and_not_the_file(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    evil = POLICY.replace("a.org", "evil.org")
    sign(place.policy, place.reviewer, Programs())
    place.policy.write_text(evil)
    check = signing.check_signatures

    def swap_back_then_check(layer: Layer, *rest: object) -> None:
        place.policy.write_text(POLICY)  # after it was read, before its signature is looked at
        check(layer, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(signing, "check_signatures", swap_back_then_check)
    place.refused()


def test_the_profile_that_a_policy_names_is_signed_with_it(place: Place) -> None:
    profile = place.policy.parent / "seccomp.json"
    profile.write_text('{"defaultAction": "SCMP_ACT_ERRNO", "syscalls": []}')
    place.policy.write_text("sandbox: {kernel: {seccomp: ./seccomp.json}}\n")
    made = sign(place.policy, place.reviewer, Programs())
    assert made == [signature_of(place.policy), signature_of(profile)]
    assert len(place.read().kernel.seccomp) == 1
    profile.write_text('{"defaultAction": "SCMP_ACT_ALLOW", "syscalls": []}')
    assert str(profile) in place.refused().brief


def test_a_persons_own_file_has_to_be_signed_too(place: Place) -> None:
    sign(place.policy, place.reviewer, Programs())
    place.user.write_text("sandbox: {network: {mode: filtered, allowed_hosts: ['*']}}\n")
    assert str(place.user) in place.refused().brief
    sign(place.user, place.reviewer, Programs())
    assert place.read().network.mode == "proxy"


def test_only_the_organisation_demands_it(place: Place) -> None:
    for text in ("signed: {allowed_signers: /x}", "signed: {allowed_signers: /x, principals: []}"):
        place.policy.write_text(f"sandbox:\n  {text}\n")
        with pytest.raises(UserInputError) as caught:
            load_layer(place.policy)
        assert "line 2: sandbox.signed" in caught.value.brief
    place.policy.write_text(POLICY)
    place.demand("allowed_signers: signers")
    with pytest.raises(UserInputError, match="absolute"):
        place.read()
    place.demand("allowed_signers: /no/such/file")
    with pytest.raises(HostError, match="/no/such/file"):
        place.read()


def test_what_anybody_can_write_says_nothing_for_the_organisation(place: Place) -> None:
    sign(place.policy, place.reviewer, Programs())
    for file in (place.organisation, place.signers):
        file.chmod(0o666)
        with pytest.raises(HostError, match="others than root"):
            place.read()
        file.chmod(0o644)
    place.read()


def test_what_cannot_be_signed(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    locked = place.policy.parent / "locked"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "a passphrase", "-f", locked], check=True)
    for wrong in (locked, place.policy, Path("/no/such/key")):
        with pytest.raises(UserInputError, match="could not be signed"):
            sign(place.policy, wrong, Programs())
    place.policy.write_text("sandbox: {netwrok: {}}\n")
    with pytest.raises(UserInputError, match="netwrok"):
        sign(place.policy, place.reviewer, Programs())
