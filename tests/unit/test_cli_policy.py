"""`vmsandbox policy …`: what it prints, and the exit status that a pipeline goes by."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from vmsandbox.egress.values import EgressEvent, EgressKind
from vmsandbox.egress.wire import event_to_json
from vmsandbox.policy.load import load_policy

NARROW = "sandbox: {network: {mode: proxy, allowed_hosts: ['@pypi'], denied_hosts: ['*']}}\n"
WIDE = "sandbox: {network: {mode: proxy, allowed_hosts: ['@pypi', 'pypi.org', '*.example.org']}}\n"


def run(folder: Path, *words: str, home: Path = Path("h")) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "VMSANDBOX_HOME": str(home), "NO_COLOR": "1"}
    return subprocess.run(
        [sys.executable, "-m", "vmsandbox", "policy", *words],
        capture_output=True, text=True, env=environment, cwd=folder, timeout=60,
    )  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "a.yaml").write_text(NARROW)
    (tmp_path / "b.yaml").write_text(WIDE)
    (tmp_path / ".claude").mkdir()
    (tmp_path / ".claude/sandbox.yaml").write_text(NARROW)
    return tmp_path


def test_check_finds_the_policy_that_is_here_and_says_what_is_odd(folder: Path) -> None:
    here = run(folder, "check")
    assert here.returncode == 0 and here.stdout == ".claude/sandbox.yaml is valid\n"
    odd = run(folder, "check", "b.yaml")
    assert odd.returncode == 0 and "WARNING: sandbox.network.allowed_hosts[1] allows all of pypi.org" in odd.stdout
    told = json.loads(run(folder, "check", "b.yaml", "--json").stdout)
    assert told["valid"] and told["findings"][0]["where"] == "sandbox.network.allowed_hosts[1]"


def test_check_refuses_what_is_wrong(folder: Path) -> None:
    (folder / "c.yaml").write_text("sandbox:\n  network:\n    allowed_hosts: ['@pipy']\n")
    wrong = run(folder, "check", "c.yaml")
    assert wrong.returncode == 125 and "line 3: sandbox.network.allowed_hosts[0]" in wrong.stderr
    assert json.loads(run(folder, "check", "c.yaml", "--json").stdout)["error"] == "UserInputError"
    (folder / ".claude/sandbox.yaml").unlink()
    assert run(folder, "check").returncode == 125


def test_show_writes_bundles_out(folder: Path) -> None:
    shown = run(folder, "show").stdout
    assert "files.pythonhosted.org" in shown and "/simple/*" in shown and "everything else" in shown
    plain = json.loads(run(folder, "show", "--json").stdout)
    assert [rule["pattern"] for rule in plain["allow"]] == ["pypi.org", "files.pythonhosted.org"]


def test_diff_says_what_is_new_and_fails_if_anything_is(folder: Path) -> None:
    wider = run(folder, "diff", "a.yaml", "b.yaml")
    assert wider.returncode == 1 and "+ *.example.org  port 80, 443  any method  any path" in wider.stdout
    narrower = run(folder, "diff", "b.yaml", "a.yaml")
    assert narrower.returncode == 0 and "B allows nothing that A does not" in narrower.stdout
    assert "- *.example.org" in narrower.stdout
    told = json.loads(run(folder, "diff", "a.yaml", "b.yaml", "--json").stdout)
    assert told["widens"] and {one["host"] for one in told["allows"]} == {"pypi.org", "*.example.org"}
    assert "Exit status 1" in run(folder, "diff", "--help").stdout


def test_schema_knows_every_key(folder: Path) -> None:
    schema = json.loads(run(folder, "schema").stdout)
    properties = schema["$defs"]["Network"]["properties"]
    assert {"mode", "allowed_hosts", "rules", "secrets", "packages", "dlp", "limits", "resolver"} <= set(properties)
    assert "from" in schema["$defs"]["Secret"]["properties"]


def test_propose_prints_a_policy_that_loads(folder: Path, short_home: Path) -> None:
    event = EgressEvent(EgressKind.LEARNED, 1, "proxy", "api.example.org", 443, "POST", "/v1/messages", rule="learn")
    (folder / "egress.jsonl").write_bytes(event_to_json(event) + b'{"kind": "learned", "time": 1, "hos')
    text = run(folder, "propose", "egress.jsonl").stdout
    (folder / "new.yaml").write_text(text)
    assert load_policy(folder / "new.yaml").network.rules[0].host == "api.example.org"
    assert run(folder, "diff", "a.yaml", "new.yaml").returncode == 1
    nothing = run(folder, "propose", "no-such-session", home=short_home)
    assert nothing.returncode == 125 and "no-such-session" in nothing.stderr


def test_a_persons_own_file_holds_too_and_show_says_where_values_are_from(folder: Path, short_home: Path) -> None:
    (short_home / "config").mkdir(parents=True)
    (short_home / "config/policy.yaml").write_text(
        "sandbox: {network: {mode: proxy, allowed_hosts: [pypi.org]}, resources: {memory: 1G}}\n"
    )
    (folder / "c.yaml").write_text(
        "sandbox:\n  resources:\n    memory: 2G\n  session: {environment: [EDITOR]}\n"
        "  network: {mode: proxy, allowed_hosts: [pypi.org, example.org]}\n"
    )
    shown = run(folder, "show", "c.yaml", home=short_home).stdout
    (memory,) = [line for line in shown.splitlines() if " memory:" in line]
    assert memory.split("#")[0].strip() == "memory: 1G" and memory.endswith("config/policy.yaml:1")
    assert "each request has to be allowed by" in shown
    told = json.loads(run(folder, "show", "c.yaml", "--json", home=short_home).stdout)
    assert told["policy"]["resources"]["memory"] == "1G" and told["origins"]["session.environment[0]"] == ["c.yaml:4"]
    assert [one["pattern"] for one in told["within"][0]["allow"]] == ["pypi.org"]
    checked = run(folder, "check", "c.yaml", home=short_home).stdout
    assert "WARNING: sandbox.resources.memory does not hold" in checked
    assert "WARNING: sandbox.network.allowed_hosts[1] allows nothing of example.org" in checked
    assert "granted only to a policy that is named with --policy: sandbox.session.environment" in checked
    assert run(folder, "show", home=short_home).returncode == 0
    (short_home / "config/policy.yaml").write_text("sandbox: {netwrok: {}}\n")
    assert run(folder, "show", "c.yaml", home=short_home).returncode == 125


def test_sign_writes_a_signature_beside_the_policy(folder: Path) -> None:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / "key"], check=True)
    done = run(folder, "sign", "a.yaml", "--key", "key")
    assert done.returncode == 0 and done.stdout == "a.yaml.sig\n"
    signed = (folder / "a.yaml.sig").read_bytes()
    assert signed.startswith(b"-----BEGIN SSH SIGNATURE-----")
    public = (folder / "key.pub").read_text()
    (folder / "signers").write_text(f"somebody {public}")
    check = [
        "ssh-keygen",
        "-Y",
        "verify",
        "-n",
        "vmsandbox-policy",
        "-I",
        "somebody",
        "-f",
        "signers",
        "-s",
        "a.yaml.sig",
    ]
    done_by_hand = subprocess.run(check, input=NARROW.encode(), cwd=folder, capture_output=True, check=False)
    assert done_by_hand.returncode == 0
    assert run(folder, "sign", "a.yaml", "--key", "no-key").returncode == 125


def test_diff_is_of_the_whole_policy(folder: Path) -> None:
    (folder / "c.yaml").write_text(NARROW.replace("}}\n", "}, commands: {allowed: [git]}, resources: {vcpus: 1}}\n"))
    wider = run(folder, "diff", "c.yaml", "a.yaml")
    assert (
        wider.returncode == 1
        and "+ commands.allowed: any command" in wider.stdout
        and "resources.vcpus" in wider.stdout
    )
    assert run(folder, "diff", "a.yaml", "c.yaml").returncode == 0
