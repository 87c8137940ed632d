"""What a policy's own command may read, when it runs again, and what a person is told where it fails."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from vmsandbox.egress.values import EgressEvent, EgressKind
from vmsandbox.egress.wire import event_to_json
from vmsandbox.guest.walk import walk_project
from vmsandbox.hypervisor.template import Template
from vmsandbox.policy.values import FilesystemPolicy, NetworkPolicy, Policy, SessionPolicy
from vmsandbox.session.opening.created_files import select_files
from vmsandbox.session.opening.creating import Creation
from vmsandbox.session.opening.creating_command import advice, refused_hosts
from vmsandbox.spec import NetworkMode

FILES = (
    "requirements.txt", "sub/requirements-dev.txt", "pyproject.toml", "src/app.py", "src/deep/data.txt", "setup/a.sh",
    "setup/b.sh", "Makefile", "README.md",
)  # fmt: skip
LISTS = ["pyproject.toml", "requirements.txt", "sub", "sub/requirements-dev.txt"]


@pytest.fixture
def project(tmp_path: Path) -> Path:
    for name in FILES:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    return tmp_path


def chosen(project: Path, command: tuple[str, ...], *files: str, denied: tuple[str, ...] = ()) -> list[str]:
    policy = Policy(
        filesystem=FilesystemPolicy(denied_paths=denied),
        session=SessionPolicy(post_create=command, post_create_files=files),
    )
    walk = select_files(walk_project(project, policy), policy.session)
    assert walk.total_bytes == sum(entry.size for entry in walk.entries) and walk.withheld == []
    return sorted(entry.path for entry in walk.entries)


@pytest.mark.parametrize(
    ("command", "more"),
    [
        (("sh", "-c", "pip install -r requirements.txt"), []),
        (("sh", "-c", "pip install six"), []),
        (("sh", "./setup/a.sh"), ["setup", "setup/a.sh"]),
        (("sh", "-c", "cd src && sh '../setup/a.sh'; make"), ["src", "src/app.py", "src/deep", "src/deep/data.txt"]),
        (("sh", "-c", "make -C setup"), ["setup", "setup/a.sh", "setup/b.sh"]),
        (("make", "--file=Makefile"), ["Makefile"]),
        (("sh", "-c", "echo 'an open quote; make -f Makefile"), ["Makefile"]),
        (("sh", "/etc/passwd", "~/x", "../../x"), []),
    ],
)
def test_a_command_gets_what_it_names_and_the_lists_of_packages(
    project: Path, command: tuple[str, ...], more: list[str]
) -> None:
    assert chosen(project, command) == sorted({*LISTS, *more})


def test_a_command_that_names_the_project_gets_all_of_it(project: Path) -> None:
    everything = sorted({*FILES, "src", "src/deep", "setup", "sub"})
    assert chosen(project, ("pip", "install", "-e", ".")) == everything
    assert chosen(project, ("true",), "./") == everything


def test_a_policy_that_names_files_names_all_of_them(project: Path) -> None:
    assert chosen(project, ("make", "setup/a.sh"), "src/*.py", "./setup") == [
        "setup", "setup/a.sh", "setup/b.sh", "src", "src/app.py"
    ]  # fmt: skip
    assert chosen(project, ("true",), "**/*.txt", denied=("./src/deep",)) == [
        "requirements.txt", "sub", "sub/requirements-dev.txt"
    ]  # fmt: skip


def test_it_runs_again_when_anything_that_it_depends_on_is_another() -> None:
    base, other = (Template(key, Path("/t") / key, {}, 0) for key in ("a", "b"))
    network = NetworkPolicy(mode="restricted", allowed_hosts=("@pypi",))
    one = Creation(base, ("make",), Policy(network=network), NetworkMode.PROXY, "1" * 64)
    wider = Policy(network=dataclasses.replace(network, allowed_hosts=("@pypi", "@npm")))
    narrower = Policy(network=dataclasses.replace(network, within=(NetworkPolicy(denied_hosts=("pypi.org",)),)))
    different = [
        dataclasses.replace(one, base=other),
        dataclasses.replace(one, command=("make", "all")),
        dataclasses.replace(one, listing="2" * 64),
        dataclasses.replace(one, listing=None),
        dataclasses.replace(one, mode=NetworkMode.NONE),
        dataclasses.replace(one, policy=wider),
        dataclasses.replace(one, policy=narrower),
        dataclasses.replace(one, policy=Policy(network=network, session=SessionPolicy(variables=(("A", "b"),)))),
    ]
    assert len({creation.key for creation in (one, *different)}) == 9
    assert dataclasses.replace(one).key == one.key
    # Without a network it does not matter what one would allow.
    offline = dataclasses.replace(one, mode=NetworkMode.NONE)
    assert dataclasses.replace(offline, policy=wider).key == offline.key


@pytest.mark.parametrize(
    ("command", "refused", "network", "says"),
    [
        (("sh", "-c", "pip install -r requirements.txt"), False, False, ["no network", '"@pypi"']),
        (("sh", "-c", "npm ci && cargo fetch"), True, True, ['"@crates", "@npm"', "logs create-1 --egress"]),
        (("make",), True, True, ["HOST"]),
        (("make",), False, True, ["post_create_files"]),
    ],
)
def test_advice(command: tuple[str, ...], refused: bool, network: bool, says: list[str]) -> None:
    text = "\n".join(advice(command, "create-1" if refused else None, network))
    assert all(one in text for one in (*says, "post_create_files"))
    assert ("no network" in text) is not network


def test_refused_hosts_are_named_once_and_cannot_drive_a_terminal(tmp_path: Path) -> None:
    path = tmp_path / "egress.jsonl"
    events = [EgressEvent(EgressKind.REFUSED, 1.0, host="a.org", port=443, reason="no rule\x1b[2J")] * 3
    events += [EgressEvent(EgressKind.ALLOWED, 1.0, host="b.org", port=443)]
    events += [EgressEvent(EgressKind.FAILED, 1.0, host=f"c{number}.org", port=1) for number in range(20)]
    path.write_bytes(b"nonsense\n" + b"".join(event_to_json(event) for event in events))
    found = refused_hosts(path)
    assert len(found) == 9 and found[-1] == "…" and found[0].startswith("a.org:443: no rule") and "\x1b" not in found[0]
    assert refused_hosts(tmp_path / "none") == []
