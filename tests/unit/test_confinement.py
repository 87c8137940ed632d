"""What a policy asks of a guest, as a message; and the comparison of what is in force with it."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmsandbox.errors import GuestError, UserInputError
from vmsandbox.paths import resource_folder
from vmsandbox.policy.values import (
    CommandsPolicy,
    FilesystemPolicy,
    KernelPolicy,
    Policy,
    ResourcesPolicy,
    ReturnPolicy,
    SeccompProfile,
    SessionPolicy,
    Tmpfs,
)
from vmsandbox.render import confinement
from vmsandbox.render.confinement import MESSAGE_LIMIT, confinement_of
from vmsandbox.render.guest_paths import ETC_NEEDED, guest_paths
from vmsandbox.render.readback import (
    SYSCTLS,
    differences,
    expected_of,
    expected_of_project,
    parse_facts,
    script_of,
)
from vmsandbox.session.transfer.enforced import denied_names, guard_request

Golden = Callable[[str, str], None]

SAMPLE = FilesystemPolicy(("./src", "./tests", "/tmp/claude-work"), ("./secrets/", "~/.ssh/", "/etc/"))
POLICIES = {
    "sample": Policy(filesystem=SAMPLE, commands=CommandsPolicy(("git",), ("curl *",))),
    "limits": Policy(
        filesystem=FilesystemPolicy(tmpfs=(Tmpfs("/tmp", 100 << 20), Tmpfs("/home/claude-worker/.cache", 9, True))),
        resources=ResourcesPolicy(processes=128),
        kernel=KernelPolicy(capabilities=("chown", "net_raw"), new_privileges=True, user_namespaces=True),
        session=SessionPolicy(post_create=("sh", "-c", "true")),
    ),
    "odd-names": Policy(filesystem=FilesystemPolicy(("/opt/a b", "~/x%h"), ("~/x%h/one/two", "/srv/\"q'\\;#"))),
}  # fmt: skip


@pytest.mark.parametrize("name", POLICIES)
def test_message(golden: Golden, name: str) -> None:
    golden(f"confinement-{name}.json", json.dumps(confinement_of(POLICIES[name]), indent=1) + "\n")


@pytest.mark.parametrize(
    "policy",
    [
        Policy(),
        Policy(returns=ReturnPolicy(files=3), resources=ResourcesPolicy(vcpus=2)),
        Policy(
            filesystem=FilesystemPolicy(denied_paths=("./secrets", "*.pem", "**/id_*"), read_only=True, output="out")
        ),
    ],
)
def test_a_policy_that_asks_nothing_static_needs_no_template(policy: Policy) -> None:
    assert confinement_of(policy) is None


def test_a_folder_on_the_way_to_a_hidden_one_is_pinned_only_where_it_may_be_written() -> None:
    """`BindPaths` makes a writable mount, also within what is read-only."""

    def pins(*allowed: str) -> list[str]:
        message = confinement_of(Policy(filesystem=FilesystemPolicy(allowed, ("~/.config/vault",))))
        assert message is not None
        (unit,) = (text for path, _mode, text in message["files"] if path == confinement.UNIT)
        return re.findall(r"^BindPaths=-(.*)$", unit, re.M)

    assert pins() == pins("~/") == ["/home/claude-worker/.config"]
    assert pins("/tmp/x") == []


def test_a_project_is_guarded_as_the_policy_says() -> None:
    def request(**filesystem: object) -> object:
        policy = Policy(filesystem=FilesystemPolicy(**filesystem))  # type: ignore[arg-type]
        return guard_request(policy, "/p", ("d",))["writable"]

    assert request() is None
    assert request(allowed_paths=("./src", "/tmp/x")) == [".git", "src"]
    assert request(allowed_paths=("/tmp/x",)) == [".git"]
    assert request(allowed_paths=("/tmp/x", ".")) is request(allowed_paths=("~/",)) is None
    assert request(allowed_paths=("./src",), read_only=True, output="./out/") == ["out"]
    assert request(read_only=True) == []


def test_without_a_project_its_folder_is_closed_where_little_may_be_written() -> None:
    assert guard_request(Policy(filesystem=SAMPLE), None, ())["writable"] == []
    assert guard_request(Policy(filesystem=FilesystemPolicy(read_only=True)), None, ())["writable"] is None


def test_memory_may_be_written_unless_only_a_part_of_it_may() -> None:
    tmpfs = (Tmpfs("/tmp", 1 << 20),)
    assert guest_paths(FilesystemPolicy(("./src",), tmpfs=tmpfs)).writable == ("/tmp",)
    assert guest_paths(FilesystemPolicy(("./src", "/tmp/work"), tmpfs=tmpfs)).writable == ("/tmp/work",)
    message = confinement_of(Policy(filesystem=FilesystemPolicy(("./src", "/tmp/work"), tmpfs=tmpfs)))
    assert message is not None and ["/etc/vmsandbox/worker.env", 0o644, "export TMPDIR=/tmp/work\n"] in message["files"]


@pytest.mark.parametrize("path", ["/", "/usr", "/usr/bin/", "/home", "~/", "~/projects", "/run", "/etc/passwd", "/dev"])
def test_what_every_guest_needs_cannot_be_hidden(path: str) -> None:
    with pytest.raises(UserInputError, match="cannot be hidden"):
        confinement_of(Policy(filesystem=FilesystemPolicy(denied_paths=(path,))))


def test_a_message_that_is_too_long_is_refused() -> None:
    paths = tuple(f"/opt/{number:0100}" for number in range(MESSAGE_LIMIT // 100))
    with pytest.raises(UserInputError, match="too long"):
        confinement_of(Policy(filesystem=FilesystemPolicy(denied_paths=paths)))


def test_etc_gives_back_nothing_that_is_secret() -> None:
    assert not {"shadow", "gshadow", "sudoers", "ssh", "cloud", "systemd", "audit", "security", "pam.d"} & set(
        ETC_NEEDED
    )


@given(st.text(min_size=1, max_size=12).filter(lambda text: "\0" not in text and "/" not in text))
def test_any_path_is_one_word_of_a_unit(name: str) -> None:
    word = confinement._word(f"/opt/{name}")
    assert re.fullmatch(r'"(?:[^"\\\x00-\x1f]|\\.)*"|[^\x00-\x20"\'\\;#]+', word)


def test_the_unit_gives_no_more_capabilities_than_the_read_back_expects() -> None:
    unit = (resource_folder("cloudinit") / "guest/vmsandbox-ssh@.service").read_text()
    (line,) = re.findall(r"^CapabilityBoundingSet=(.*)$", unit, re.M)
    assert tuple(sorted(line.lower().replace("cap_", "").split())) == confinement.LOGIN_CAPABILITIES


def test_the_sysctls_that_are_read_back_are_those_that_are_set() -> None:
    text = (resource_folder("cloudinit") / "guest/90-vmsandbox.conf").read_text()
    assert set(SYSCTLS.items()) <= set(re.findall(r"^-(\S+) = (\S+)$", text, re.M))


def test_denied_names_follow_links(tmp_path: Path) -> None:
    (tmp_path / "real/deep").mkdir(parents=True)
    (tmp_path / "link").symlink_to("real")
    policy = Policy(filesystem=FilesystemPolicy(denied_paths=("./link/deep", "a/b", "a/b/c", "*.pem", "/etc")))
    assert denied_names(policy, tmp_path) == ("a/b", "real/deep")


# -- the read-back -------------------------------------------------------------------------------------------------

STATUS = ["NoNewPrivs:\t1", "Seccomp_filters:\t0", "CapBnd:\t00000000000400e9",
          "CapInh:\t0", "CapPrm:\t0", "CapEff:\t0", "CapAmb:\t0"]  # fmt: skip
POLICY = Policy(
    filesystem=dataclasses.replace(SAMPLE, tmpfs=(Tmpfs("/tmp", 100 << 20),)), resources=ResourcesPolicy(processes=100)
)
MOUNT = "36 26 0:31 / /tmp rw,nosuid,nodev,noexec shared:14 - tmpfs vmsandbox rw,size=102400k"


def good_facts() -> dict[str, list[str]]:
    expected = expected_of(POLICY)
    return {
        "status": STATUS,
        "parent": ["Seccomp_filters:\t0"],
        "mounts": [MOUNT],
        "unit.pids": ["100"],
        "slice.pids": ["164"],
        "slice.memory": ["1000"],
        **{f"sysctl {name}": [value] for name, value in expected.sysctls},
        "paths": [f"erwx {path}" for path in expected.writable]
        + [f"erx {path}" for path in expected.read_only]
        + [f"e {path}" for path in expected.hidden],
    }


def test_nothing_is_found_where_all_is_as_the_policy_says() -> None:
    assert differences(expected_of(POLICY), good_facts()) == []


@pytest.mark.parametrize(
    ("section", "line", "instead", "says"),
    [
        ("status", "NoNewPrivs:\t1", "NoNewPrivs:\t0", "gain privileges"),
        ("status", "Seccomp_filters:\t0", "Seccomp_filters:\t1", "1 system-call filters"),
        ("status", "CapBnd:\t00000000000400e9", "CapBnd:\t00000000002400e9", "bounding set"),
        ("status", "CapEff:\t0", "CapEff:\t1", "CapEff"),
        ("unit.pids", "100", "max", "unit.pids"),
        ("slice.pids", "164", "max", "slice.pids"),
        ("slice.memory", "1000", "max", "no limit"),
        ("sysctl kernel.kexec_load_disabled", "1", "0", "kexec"),
        ("mounts", MOUNT, MOUNT.replace(",noexec", ""), "/tmp is mounted"),
        ("mounts", MOUNT, MOUNT.replace("102400k", "204800k"), "another size"),
        ("mounts", MOUNT, MOUNT.replace("/tmp", "/tmq"), "not memory"),
        ("mounts", MOUNT, "garbage", "not memory"),
        ("paths", "erx /home/claude-worker", "erwx /home/claude-worker", "can be written"),
        ("paths", "erx /home/claude-worker", "", "can be written"),
        ("paths", "erwx /tmp/claude-work", "erx /tmp/claude-work", "cannot be written"),
        ("paths", "e /home/claude-worker/.ssh", "ex /home/claude-worker/.ssh", "can be entered"),
        ("paths", "e /home/claude-worker/.ssh", "", "can be entered"),
    ],
)
def test_each_difference_is_found(section: str, line: str, instead: str, says: str) -> None:
    facts = good_facts()
    assert line in facts[section]
    facts[section] = [instead if one == line else one for one in facts[section]]
    (found,) = differences(expected_of(POLICY), facts)
    assert says in found


BLIND = dataclasses.replace(
    POLICY,
    kernel=KernelPolicy(
        seccomp=(
            SeccompProfile(
                Path("p.json"),
                '{"defaultAction": "SCMP_ACT_ALLOW", "architectures": ["SCMP_ARCH_X86_64"], '
                '"syscalls": [{"names": ["faccessat2"], "action": "SCMP_ACT_ERRNO"}]}',
            ),
        )
    ),
)


def test_what_may_be_written_is_worked_out_where_it_cannot_be_asked() -> None:
    """By whose it is and how its mount is; the last mount of a place lies over the others."""
    expected = expected_of(BLIND)
    assert not expected.may_ask and expected_of(POLICY).may_ask
    at = "36 26 0:31 / {} {},relatime shared:14 - ext4 /dev/vda rw"
    memory = MOUNT.replace(" rw,", " ro,")
    home = [at.format("/", "ro"), at.format("/home", "ro"), memory, at.format("/tmp/claude-work", "rw")]
    facts = good_facts() | {
        "mounts": home,
        "status": [line.replace("filters:\t0", "filters:\t1") for line in STATUS],
        "paths": [f"erxo {path}" for path in expected.writable]
        + [f"erxo {path}" for path in expected.read_only if path.startswith("/home")]
        + [f"erxk {path}" for path in expected.read_only if not path.startswith("/home")]
        + [f"e {path}" for path in expected.hidden],
    }
    assert differences(expected, facts) == []
    for mounts, says in (
        ([*home, at.format("/home/claude-worker", "rw")], "/home/claude-worker can be written"),
        ([*home, at.format("/tmp/claude-work", "ro")], "/tmp/claude-work cannot be written"),
        ([at.format("/", "rw"), *home[1:]], "/var/tmp can be written"),
        ([*home, at.format("/tmp", "rw")], "/tmp can be written"),
    ):
        assert any(says in one for one in differences(expected, facts | {"mounts": mounts})), mounts
    assert differences(expected, facts | {"mounts": [*home, at.format("/home", "rw"), at.format("/home", "ro")]}) == []
    project = expected_of_project(BLIND, "/p", ())
    lines = ["erxo /p", "erxo /p/src", "erxo /p/tests", "erxo /p/.git"]
    there = [at.format("/p", "ro"), *(at.format(f"/p/{name}", "rw") for name in ("src", "tests", ".git"))]
    assert differences(project, {"project": lines, "project mounts": there}, "project") == []
    assert len(differences(project, {"project": lines, "project mounts": there[:3]}, "project")) == 1


def test_the_project_is_compared_too() -> None:
    expected = expected_of_project(POLICY, "/p", ("secrets",))
    good = ["erx /p", "erwx /p/src", "erwx /p/tests", "erwx /p/.git", "e /p/secrets"]
    assert differences(expected, {"project": good}, "project") == []
    assert len(differences(expected, {"project": [f"erwx {line.split()[1]}" for line in good]}, "project")) == 2
    assert len(differences(expected, {}, "project")) == 5


@pytest.mark.parametrize("may_ask", [True, False])
def test_the_script_runs_in_a_shell_and_is_understood(tmp_path: Path, may_ask: bool) -> None:
    (tmp_path / "it's").mkdir()
    (tmp_path / "closed").mkdir(mode=0o500)
    hidden = (str(tmp_path / "it's"), "/nowhere")
    expected = dataclasses.replace(expected_of(Policy()), hidden=hidden, may_ask=may_ask)
    script = script_of(expected, dataclasses.replace(expected, hidden=(str(tmp_path / "closed"),)))
    done = subprocess.run(["/bin/bash", "-c", script], input=b"go\n", capture_output=True, env={"PATH": "/none"})
    facts = parse_facts(done.stdout)
    assert f"{'erwx' if may_ask else 'erxo'} {tmp_path}/it's" in facts["paths"] and "- /nowhere" in facts["paths"]
    assert ("project mounts" in facts) is not may_ask
    assert facts["project"][-1].endswith("/closed")
    assert any(line.startswith("NoNewPrivs:") for line in facts["status"])
    assert any(" / / " in line for line in facts["mounts"])


@pytest.mark.parametrize("untrusted", [b"", b"=status\n", b"\xff=end\n", b"=status\nx\n=paths\n=en"])
def test_what_is_not_whole_is_no_answer(untrusted: bytes) -> None:
    with pytest.raises(GuestError):
        parse_facts(untrusted)


def test_what_stays_of_etc_is_documented() -> None:
    text = (Path(__file__).parents[2] / "docs/confinement.md").read_text().partition("ETC_NEEDED -->")[2]
    assert tuple(re.findall(r"`([^`]+)`", text)) == ETC_NEEDED
