"""What the patterns of a policy's command rules mean, hostile arguments included."""

from __future__ import annotations

import importlib
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmsandbox.paths import resource_folder

sys.path.append(str(resource_folder("cloudinit") / "guest"))
commands: Any = importlib.import_module("vmsandbox_commands")
ALLOW, ASK, DENY = commands.ALLOW, commands.ASK, commands.DENY

SAMPLE = {
    "allowed": ["python", "pytest", "black", "git"],
    "denied": ["rm -rf /", "curl *", "wget *"],
    "require_confirmation": ["pip install *", "npm install *", "docker *"],
}
# What a Debian guest has: the file, and the links that lead to it.
SYSTEM = {
    "python3.13": ("/usr/bin/python3.13", ("python3", "python")), "pip3": ("/usr/bin/pip3", ("pip",)),
    "dash": ("/usr/bin/dash", ("sh",)), "ld-linux-x86-64.so.2": ("/usr/lib/ld-linux-x86-64.so.2", ()),
}  # fmt: skip


def program(name: str) -> Any:
    """A program of the system's, by one of its names."""
    for file, (path, links) in SYSTEM.items():
        if name in (file, *links):
            names = {file, *links}
            return commands.Program(names, names, {path}, {path}, None, path)
    path = f"/usr/bin/{name}"
    return commands.Program({name}, {name}, {path}, {path}, None, path)


def find(path: str) -> Any:
    return program(path.rpartition("/")[2]) if path.startswith("/usr/bin/") else None


def judge(argv: list[str], *layers: dict[str, list[str]], cwd: str | None = "/home/claude-worker") -> int:
    command = commands.Command(program(argv[0]), argv[1:], argv[0], lambda: cwd, False, find)
    verdict: int = commands.Rules(list(layers) or [SAMPLE]).judge(command)[0]
    return verdict


@pytest.mark.parametrize(
    ("verdict", "line"),
    [
        (ALLOW, "python x.py"), (ALLOW, "python3 -c pass"), (ALLOW, "python3.13"), (ALLOW, "git commit -m x"),
        (DENY, "ls"), (DENY, "sh -c true"), (DENY, "bash"), (DENY, "env git status"), (DENY, "pythonx"),
        (DENY, "pip list"), (DENY, "curl"), (DENY, "curl https://example.org"), (DENY, "wget -q x"),
        (ASK, "pip install x"), (ASK, "pip3 install"), (ASK, "python -m pip install x"),
        (ASK, "python3 -Im pip install x"),
        (ASK, "python3 -mpip install x"), (ASK, "python3 -X dev -W ignore -m pip -q --proxy http://x install y"),
        (ASK, "python3 /usr/bin/pip install x"), (ASK, "pip --isolated install x"),
        (ASK, "pip --cache-dir d install x"),
        (ASK, "npm install"), (ASK, "npm i left-pad"), (ASK, "docker"), (ASK, "docker run x"),
        (ALLOW, "python3 -m pip list"), (ALLOW, "python3 -m pytest install"), (ALLOW, "python3 x.py pip install"),
        (DENY, "ld-linux-x86-64.so.2 /usr/bin/curl x"), (DENY, "busybox wget x"),
    ],
)  # fmt: skip
def test_the_sample_policy(verdict: int, line: str) -> None:
    assert judge(line.split()) == verdict


@pytest.mark.parametrize(
    "line",
    [
        "rm -rf /", "rm -fr /", "rm -r -f /", "rm -Rf /", "rm -rfv /", "rm --recursive --force /", "rm --rec --for /",
        "rm -rf --no-preserve-root /", "rm -rf -- /", "rm -rf //", "rm -rf /.", "rm -rf /usr/..", "rm -rf x /",
        "rm / -rf",
    ],
)  # fmt: skip
def test_a_denied_command_however_it_is_written(line: str) -> None:
    layer = {"denied": SAMPLE["denied"]}
    assert judge(line.split(), layer) == DENY
    assert judge(["busybox", *line.split()], layer) == DENY


def test_a_denied_command_means_no_more_than_it_says() -> None:
    layer = {"denied": SAMPLE["denied"]}
    for line in ("rm -rf /tmp/x", "rm -r /", "rm -f /", "rm -rf .", "rmdir /", "curlx", "xcurl a"):
        assert judge(line.split(), layer) == ALLOW, line
    assert judge(["rm", "-rf", "."], layer, cwd="/") == DENY
    assert judge(["rm", "-rf", "../.."], layer, cwd="/home/claude-worker") == DENY


@pytest.mark.parametrize(
    ("pattern", "line", "allowed"),
    [
        ("git status", "git status", True), ("git status", "git status -s", False),
        ("git status *", "git status", True),
        ("git status *", "git -C x status", False), ("git *", "git", True), ("git log -?", "git log -3", True),
        ("make test *", "make test a b", True), ("make test *", "make a test", False), ("/usr/bin/git", "git x", True),
        ("/usr/local/bin/git", "git x", False), ("g*", "git x", True), ("python3", "python x", True),
        ("python3.13", "python x", True), ("python3.12", "python3 x", True), ("base64", "base32", False),
        ("* --help", "git --help", True), ("* --help", "git push", False), ("a 'b c'", "a b c", False),
    ],
)  # fmt: skip
def test_an_allowed_pattern_is_read_word_by_word(pattern: str, line: str, allowed: bool) -> None:
    assert judge(line.split(), {"allowed": [pattern]}) == (ALLOW if allowed else DENY)


def test_the_strictest_list_and_the_strictest_layer_decide() -> None:
    assert judge(["git", "push"], {"allowed": ["git"], "require_confirmation": ["git push *"]}) == ASK
    assert judge(["git", "push"], {"require_confirmation": ["git *"], "denied": ["git push"]}) == DENY
    assert judge(["git"], {"allowed": ["git"]}, {"allowed": ["git", "ls"]}) == ALLOW
    assert judge(["ls"], {"allowed": ["git"]}, {"allowed": ["git", "ls"]}) == DENY
    assert judge(["git"], {"allowed": ["git"]}, {"require_confirmation": ["git"]}) == ASK
    assert judge(["anything"], {}) == ALLOW


def test_a_helper_belongs_to_its_program() -> None:
    path = "/usr/lib/git-core/git-remote-https"
    helper = commands.Program({"git-remote-https"}, {"git-remote-https"}, {path}, {path}, None, path)
    for pattern, verdict in (("git", ALLOW), ("git fetch *", ALLOW), ("ls", DENY)):
        assert commands.Rules([{"allowed": [pattern]}]).judge(commands.Command(helper))[0] == verdict


def test_a_script_of_the_workers_is_what_interprets_it() -> None:
    def script(interpreter: str, *before: str, name: str = "black") -> Any:
        path = f"/home/claude-worker/{name}"
        return commands.Program({name}, (), {path}, {path}, (program(interpreter), before), path, steady=False)

    def verdict(one: Any, *args: str, layer: dict[str, list[str]] = SAMPLE) -> int:
        found: int = commands.Rules([layer]).judge(commands.Command(one, args))[0]
        return found

    assert verdict(script("python3")) == ALLOW
    assert verdict(script("python3", name="any.py")) == ALLOW, "python any.py would do the same"
    assert verdict(script("env", "python3")) == ALLOW, "the execve of python3 is judged"
    assert verdict(script("sh")) == DENY
    assert verdict(script("curl"), layer={"denied": ["curl *"]}) == DENY
    assert verdict(script("python3", name="pip"), "install", "x") == ASK
    assert verdict(script("python3", "-mpip", name="x"), layer={"denied": ["pip *"]}) == DENY


def test_a_name_alone_does_not_make_a_program_allowed() -> None:
    fake = commands.Program({"git"}, (), {"/tmp/git"}, {"/tmp/git"}, None, "/tmp/git", steady=False)
    assert commands.Rules([SAMPLE]).judge(commands.Command(fake))[0] == DENY
    assert commands.Rules([{"denied": ["git"]}]).judge(commands.Command(fake))[0] == DENY
    assert commands.Rules([{"allowed": ["/tmp/git"]}]).judge(commands.Command(fake))[0] == ALLOW


def test_what_was_not_read_to_its_end_is_not_let_through() -> None:
    def cut(line: str, layer: dict[str, list[str]]) -> int:
        argv = line.split()
        command = commands.Command(program(argv[0]), argv[1:], argv[0], lambda: "/", True, find)
        found: int = commands.Rules([layer]).judge(command)[0]
        return found

    assert cut("rm a b", {"denied": ["rm -rf /"]}) == DENY
    assert cut("pip install", SAMPLE) == ASK
    assert cut("git add", {"allowed": ["git"]}) == ALLOW
    assert cut("git add", {"allowed": ["git add *"]}) == DENY


def test_a_line_that_could_mean_very_much_takes_no_time() -> None:
    import time

    began = time.monotonic()
    for word in ("sh", "python", "busybox", "--x", "/usr/bin/python3"):
        judge(["python3", *["--x", word] * 250])
        judge(["busybox", *[word] * 500])
        judge(["rm", *["-x", word] * 250], {"denied": ["rm * a * b * c * d * e"]})
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("text", ["", "  ", "''", "git 'x", "a\0b"])
def test_a_pattern_that_is_none_says_why(text: str) -> None:
    assert commands.pattern_problem(text)
    with pytest.raises(ValueError):
        commands.Pattern(text)


HOSTILE = st.one_of(
    st.sampled_from(
        ["\n", "; rm -rf /", "'", '"', "$(id)", "`id`", "*", "--", "-", "", "/", "\udcff", "[", "a\nb", "|"]
    ),
    st.text(max_size=8),
)


@given(st.lists(HOSTILE, max_size=6))
def test_arguments_are_data(args: list[str]) -> None:
    """No argument makes an allowed program another one, or hides a denied one."""
    assert judge(["git", *args]) == ALLOW
    assert judge(["curl", *args]) == DENY
    assert judge(["docker", *args]) == ASK
    assert judge(["ls", *args]) == DENY


@given(st.lists(HOSTILE, max_size=3), st.lists(HOSTILE, max_size=4))
def test_what_is_asked_about_is_asked_about_whatever_else_is_said(options: list[str], rest: list[str]) -> None:
    before = ["-" + one for one in options if one not in ("", "-")]
    for line in (["pip", *before, "install", *rest], ["python3", "-m", "pip", *before, "install", *rest]):
        assert judge(line) == ASK, line


@given(st.lists(HOSTILE, min_size=1, max_size=5))
def test_denied_is_never_narrower_than_allowed(args: list[str]) -> None:
    """Whatever a pattern would allow, it denies."""
    import shlex

    line = shlex.join(["git", *args])
    try:
        commands.Pattern(line)
    except ValueError:
        return
    if judge(["git", *args], {"allowed": [line]}) == ALLOW:
        assert judge(["git", *args], {"denied": [line]}) == DENY


@given(
    st.lists(HOSTILE, max_size=5),
    st.lists(st.sampled_from([one for patterns in SAMPLE.values() for one in patterns]), max_size=4),
)
def test_one_more_layer_never_allows_more(args: list[str], patterns: list[str]) -> None:
    for name in ("git", "pip", "ls", "rm"):
        for kind in SAMPLE:
            assert judge([name, *args], SAMPLE, {kind: patterns}) >= judge([name, *args], SAMPLE)
