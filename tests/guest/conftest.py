"""One home, one image and one template for all guest tests; what is cheap to know when a test fails.

`VMSANDBOX_TEST_HOME` (default /var/tmp/vmsandbox-test) is kept between runs: an image and two templates are in it.
"""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import yaml
from harness import ROOT_SERVER, Cli, Guest, RootedGuest, leftovers, make_tree, new_leftovers
from netted import SECRET
from upstream import Upstream, serve

from vmsandbox.broker.environment import make_environment
from vmsandbox.hypervisor.console import ConsoleTail
from vmsandbox.monitor import Monitor
from vmsandbox.paths import resource_folder
from vmsandbox.policy.values import Policy
from vmsandbox.process import Programs
from vmsandbox.session import plan
from vmsandbox.session.plan import SessionRequest
from vmsandbox.session.sandbox import Sandbox

HOME = Path(os.environ.get("VMSANDBOX_TEST_HOME", "/var/tmp/vmsandbox-test")).absolute()
TESTS = Path(__file__).parent
_consoles: dict[str, ConsoleTail] = {}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if TESTS in item.path.parents:
            item.add_marker(pytest.mark.guest)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[Any]) -> Any:
    """A failed guest test shows the newest journal and the end of each console."""
    report = yield
    if report.failed and TESTS in item.path.parents:
        records = sorted((HOME / "records").glob("*/events.jsonl"), key=lambda path: path.stat().st_mtime)
        for path in records[-2:]:
            report.sections.append((f"journal {path.parent.name}", path.read_text()[-1500:]))
        for name, console in _consoles.items():
            report.sections.append((f"console of {name}", console.text()))
    return report


@pytest.fixture(scope="session")
def home() -> Path:
    """The tests' home, with the image `base` in it."""
    HOME.mkdir(mode=0o711, parents=True, exist_ok=True)
    if not (HOME / "images/base/current").is_symlink():
        Cli(HOME)("image", "build", "base", timeout=900)
    return HOME


@pytest.fixture(scope="session")
def cli(home: Path) -> Cli:
    """The command line, with a template made already."""
    run = Cli(home)
    run("gc")
    run("session", "--empty", "--", "true", timeout=400)
    return run


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """Whatever a test did: afterwards there is no guest, socket, process or file that was not there before."""
    before = leftovers(HOME)
    yield
    assert not new_leftovers(HOME, before)


def _watched(guest: Guest, stack: ExitStack) -> Guest:
    _consoles[guest.name] = stack.enter_context(ConsoleTail(guest.folder.run / "console"))
    stack.callback(_consoles.pop, guest.name)
    stack.callback(guest.stop)
    return guest


@pytest.fixture(scope="session")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small project."""
    return make_tree(
        tmp_path_factory.mktemp("projects") / "demo",
        {"README.md": "# demo\n", "src/app.py": "print('hello')\n", "src/data.bin": os.urandom(5000)},
    )


@pytest.fixture(scope="session")
def guest(cli: Cli, project: Path) -> Iterator[Guest]:
    """A running guest with the small project in it, for tests that leave it as it is."""
    with ExitStack() as stack:
        name = cli("start", project, "--no-snapshot", "--name", "shared").stdout.decode().strip()
        yield _watched(cli.guest(name), stack)


@pytest.fixture
def fork(cli: Cli) -> Iterator[Callable[..., Guest]]:
    """Makes guests that a test may do anything to: `fork("PATH or option", …)`; empty by default."""
    with ExitStack() as stack:

        def make(*words: str | Path) -> Guest:
            name = cli("start", *(words or ("--empty",)), "--no-snapshot", "--name", f"t-{uuid.uuid4().hex[:8]}").stdout
            return _watched(cli.guest(name.decode().strip()), stack)

        yield make


@pytest.fixture(scope="session")
def rooted_cloudinit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """cloudinit/ with a service in it that runs as root what the worker says."""
    folder = Path(shutil.copytree(resource_folder("cloudinit"), tmp_path_factory.mktemp("rooted") / "cloudinit"))
    user_data = yaml.safe_load((folder / "user-data.yaml").read_text())
    unit = "[Service]\nExecStart=/usr/bin/python3 /usr/local/lib/test-root.py\n"
    user_data.setdefault("write_files", []).extend(
        [
            {"path": "/usr/local/lib/test-root.py", "content": ROOT_SERVER},
            {"path": "/etc/systemd/system/test-root.service", "content": unit},
        ]
    )
    user_data["runcmd"].insert(0, ["systemctl", "start", "--no-block", "test-root.service"])
    (folder / "user-data.yaml").write_text("#cloud-config\n" + yaml.safe_dump(user_data))
    return folder


@pytest.fixture
def rooted(cli: Cli, rooted_cloudinit: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., RootedGuest]]:
    """Makes guests whose root is in the test's hands."""
    monkeypatch.setattr(plan, "resource_folder", lambda _name: rooted_cloudinit)
    with ExitStack() as stack:

        def make(policy: Policy | None = None) -> RootedGuest:
            name = f"r-{uuid.uuid4().hex[:8]}"
            request = SessionRequest(name=name, policy=policy or Policy(), allow_emulation=True, keep=True)
            sandbox = Sandbox.open(request=request, layout=cli.layout)
            sandbox.disconnect()
            guest = RootedGuest(cli, sandbox.name)
            _watched(guest, stack)
            return guest

        yield make


@pytest.fixture(scope="session")
def upstream(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Upstream]:
    up, server = serve(tmp_path_factory.mktemp("upstream"))
    yield up
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="session")
def netcli(cli: Cli, upstream: Upstream) -> Iterator[Cli]:
    """The command line, where a broker trusts the tests' authority and the secret is in the environment."""
    make_environment(cli.layout, Programs(), Monitor())
    yield Cli(cli.home, {"SSL_CERT_FILE": str(upstream.bundle), "TEST_API_KEY": SECRET})


@pytest.fixture(scope="session")
def netted_project(upstream: Upstream, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tree(
        tmp_path_factory.mktemp("projects") / "netted",
        {"README.md": "# netted\n", ".claude/sandbox.yaml": upstream.policy()},
    )
