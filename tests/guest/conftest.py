"""One image and one set of templates for all guest tests; what is cheap to know when a test fails.

`VMSANDBOX_TEST_HOME` (default /var/tmp/vmsandbox-test) is kept between runs: an image and templates are in it. With
`pytest -n 2` each worker has a home of its own below it, where image, templates and cache are links to the common ones:
what a test finds on the host is its own worker's. A test marked `alone` runs while no other worker does anything.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from harness import Cli, Guest, leftovers, make_tree, new_leftovers
from netted import SECRET
from rooted import RootedGuest, with_root
from upstream import Upstream, serve

from vmsandbox.broker.environment import make_environment
from vmsandbox.hypervisor.console import ConsoleTail
from vmsandbox.monitor import Monitor
from vmsandbox.policy.values import Policy
from vmsandbox.process import Programs
from vmsandbox.session.asked.request import SessionRequest
from vmsandbox.session.opening import plan
from vmsandbox.session.sandbox import Sandbox

SHARED = Path(os.environ.get("VMSANDBOX_TEST_HOME", "/var/tmp/vmsandbox-test")).absolute()
WORKER = os.environ.get("PYTEST_XDIST_WORKER", "")
HOME = SHARED / WORKER
TESTS = Path(__file__).parent
# With two workers: the first files are one for each (an image is built and minutes go by before there is a guest), then
# the long ones, so that none of them is begun when the other worker has nothing left to do.
FIRST = ("test_accept", "test_image_build", "test_filtered", "test_resources", "test_commands", "test_interrupted")
_consoles: dict[str, ConsoleTail] = {}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if TESTS in item.path.parents:
            item.add_marker(pytest.mark.guest)
    order = {name: number for number, name in enumerate(FIRST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)) if TESTS in item.path.parents else -1)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Any:
    """A test marked `alone` waits for the other workers' tests to end, and they wait for it."""
    if not WORKER:
        return (yield)
    SHARED.mkdir(mode=0o711, parents=True, exist_ok=True)
    alone = item.get_closest_marker("alone") is not None
    # Through the gate one at a time: who waits there to be alone is not overtaken by those who need not be.
    with _locked("gate", fcntl.LOCK_EX) as gate, _locked("room", fcntl.LOCK_EX if alone else fcntl.LOCK_SH):
        fcntl.flock(gate, fcntl.LOCK_UN)
        return (yield)


@contextmanager
def _locked(name: str, kind: int) -> Iterator[int]:
    fd = os.open(SHARED / f".{name}", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, kind)
        yield fd
    finally:
        os.close(fd)


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
    if WORKER:
        borrow(SHARED, HOME)
    if not (HOME / "images/base/current").is_symlink():
        Cli(HOME)("image", "build", "base", timeout=900)
    return HOME


def borrow(lender: Path, borrower: Path) -> None:
    """Give a home another one's image, templates and cache: links, which a test may replace."""
    for name, mode in (("images", 0o755), ("templates", 0o711), ("cache", 0o755)):
        (lender / name).mkdir(mode=mode, exist_ok=True)
        if not (borrower / name).is_symlink():
            (borrower / name).symlink_to(lender / name)


@pytest.fixture(scope="session")
def cli(home: Path) -> Cli:
    """The command line, with a template made already."""
    run = Cli(home)
    run("gc")
    run("session", "--empty", "--", "true", timeout=400)
    return run


@pytest.fixture
def other_home(cli: Cli) -> Iterator[Cli]:
    """A second home that borrows the first one's image and templates; a test may replace them."""
    folder = Path(tempfile.mkdtemp(prefix="o-", dir=SHARED))
    folder.chmod(0o711)
    borrow(cli.home, folder)
    yield Cli(folder)
    left = new_leftovers(folder, set())
    shutil.rmtree(folder)
    assert not left


@pytest.fixture
def without_templates(other_home: Cli) -> Cli:
    """A second home with the image, and no template."""
    (other_home.home / "templates").unlink()
    (other_home.home / "templates").mkdir(mode=0o711)
    return other_home


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


@pytest.fixture(scope="module")
def make_rooted(cli: Cli) -> Iterator[Callable[..., RootedGuest]]:
    """Makes guests whose root is in the tests' hands: `make_rooted(policy)`."""
    with ExitStack() as stack, pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "confinement_of", with_root)

        def make(policy: Policy | None = None) -> RootedGuest:
            request = SessionRequest(
                name=f"r-{uuid.uuid4().hex[:8]}", policy=policy or Policy(), allow_emulation=True, keep=True
            )
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
