"""What pip, npm, apt and cargo fetch is recognised, and refused by name and by age."""

from __future__ import annotations

import json

import pytest
from fetching import PIP, SHA256, SHORT, Headers, ago, content, get, npm_page, pypi_page, refusal

from vmsandbox.egress.packages import Fetch, Part, recognise
from vmsandbox.egress.values import Destination, PackageRules

# host and path, what pip, npm, apt or cargo fetches there; `+` after the host: asks for npm's packument
RECOGNISED = """
pypi.org/simple/Six_Name/                                               pypi index six-name
mirror.example/api/pypi/team/simple/zope.interface                      pypi index zope-interface
pypi.org/pypi/requests/json                                             pypi index requests
pypi.org/pypi/requests/2.31.0/json                                      pypi index requests
f.example/packages/b7/ce/149a00/six-1.17.0-py2.py3-none-any.whl         pypi file six 1.17.0
f.example/x/numpy-2.1.0-1-cp311-cp311-manylinux_2_17_x86_64.manylinux2014_x86_64.whl pypi file numpy 2.1.0
f.example/packages/six-1.17.0-py2.py3-none-any.whl.metadata             pypi about six 1.17.0
f.example/packages/source/p/python-dateutil/python-dateutil-2.9.0.post0.tar.gz pypi file python-dateutil 2.9.0.post0
f.example/packages/2.7/s/setuptools/setuptools-0.6c11-py2.7.egg         pypi file setuptools 0.6c11
registry.npmjs.org/lodash                                               npm index lodash
registry.npmjs.org+/@babel%2fcore                                       npm index @babel/core
registry.npmjs.org/lodash/4.17.21                                       npm index lodash
mirror.example+/npm/group/@babel/core                                   npm index @babel/core
registry.npmjs.org/lodash/-/lodash-4.17.21.tgz                          npm file lodash 4.17.21
mirror.example/npm/@babel/core/-/core-7.24.0-rc.1.tgz?x=1               npm file @babel/core 7.24.0-rc.1
deb.debian.org/debian/dists/bookworm/main/binary-amd64/Packages.xz      debian index
deb.debian.org/debian/dists/bookworm/main/binary-amd64/by-hash/SHA256/abababab debian index
deb.debian.org/debian/pool/main/g/git/git_2.39.5-0+deb12u1_amd64.deb    debian file git 2.39.5-0+deb12u1
m.example/d/pool/universe/libs/libstdc%2B%2B6_12.2.0-14_arm64.deb       debian file libstdc++6 12.2.0-14
index.crates.io/se/rd/serde                                             crates index serde
index.crates.io/1/a                                                     crates index a
index.crates.io/3/s/syn                                                 crates index syn
m.example/cargo/index/to/ki/tokio_util                                  crates index tokio-util
static.crates.io/crates/serde/serde-1.0.210.crate                       crates file serde 1.0.210
static.crates.io/crates/serde_json/1.0.128/download                     crates file serde-json 1.0.128
crates.io/api/v1/crates/tokio-util/0.7.12/download                      crates file tokio-util 0.7.12
m.example/cargo/tokio-util-0.7.12-alpha.1.crate                         crates file tokio-util 0.7.12-alpha.1
pypi.org//simple/./x/../%73ix//                                         pypi index six
"""
OTHERS = """
pypi.org/simple/
api.example.org/v1/messages
api.example.org/lodash
git.example.org/a/b.git/info/refs?service=git-upload-pack
code.example.org/a/b/archive/refs/tags/v1.0.0.tar.gz
code.example.org/a/b/releases/download/v1/tool-1.2.tar.gz
registry.npmjs.org/
registry.npmjs.org/-/npm/v1/security/advisories/bulk
index.crates.io/config.json
a.example/se/rd/other
deb.debian.org/debian/dists/bookworm/InRelease
a.example
a.example/
a.example/../..
a.example/a.whl
"""


@pytest.mark.parametrize("line", RECOGNISED.strip().splitlines())
def test_requests_of_package_managers_are_recognised(line: str) -> None:
    url, ecosystem, part, *names = line.split()
    host, _, path = url.partition("/")
    found = recognise(host.rstrip("+"), "/" + path, SHORT if host.endswith("+") else "*/*")
    assert found == Fetch(ecosystem, Part(part), *(names or [""]))


@pytest.mark.parametrize("url", OTHERS.split())
def test_other_requests_are_not(url: str) -> None:
    host, slash, path = url.partition("/")
    assert recognise(host, slash + path, "*/*") is None


RULES = PackageRules(
    allow=("pypi:six", "npm:@scope/*", "debian:*", "Zope.Interface"), deny=("npm:@scope/evil*", "pypi:SIX_evil")
)


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("pypi.org/simple/six/", ""),
        ("pypi.org/simple/zope-interface/", ""),
        ("registry.npmjs.org/@scope%2fgood", ""),
        ("deb.debian.org/debian/pool/main/g/git/git_1_amd64.deb", ""),
        ("deb.debian.org/debian/dists/a/main/binary-amd64/Packages.xz", ""),
        ("pypi.org/simple/", ""),
        ("api.example.org/v1/anything", ""),
        ("pypi.org/simple/requests/", ""),  # pip would not show why
        ("f.example/packages/requests-2.0-py3-none-any.whl", "does not allow the package pypi:requests"),
        ("f.example/packages/requests-2.0-py3-none-any.whl.metadata", "does not allow the package pypi:requests"),
        ("f.example/packages/requests-2.0.tar.gz", "does not allow the package pypi:requests"),
        ("registry.npmjs.org/six", "does not allow the package npm:six"),
        ("registry.npmjs.org/@scope/evil-one/-/evil-one-1.0.0.tgz", "denies the package npm:@scope/evil-one"),
        ("registry.npmjs.org/@scope%2Fevil", "denies the package npm:@scope/evil"),
        ("index.crates.io/se/rd/serde", "does not allow the package crates:serde"),
        ("f.example/packages/%73ix_Evil-1.0-py3-none-any.whl", "denies the package pypi:six-evil"),
    ],
)
def test_packages_are_allowed_and_denied_at_index_and_file(url: str, why: str) -> None:
    found = refusal(content(RULES), url)
    assert why in found and bool(found) == bool(why)


SIX = "b7/ce/six-1.17.0-py2.py3-none-any.whl"


def test_a_refused_package_says_what_would_allow_it() -> None:
    found = content(PackageRules(allow=())).outgoing(Destination("pypi.org", 443), "GET", f"/packages/{SIX}", [], b"")
    assert json.loads(found.decision.remedy) == {"sandbox": {"network": {"packages": {"allow": ["pypi:six"]}}}}
    at = Destination("files.pythonhosted.org", 443)
    denied = content(PackageRules(deny=("six",))).outgoing(at, "GET", f"/packages/{SIX}", [], b"")
    assert not denied.decision.allowed and denied.decision.remedy == ""


@pytest.mark.parametrize(("days", "refused"), [(0.5, True), (6.9, True), (7.1, False), (900, False), (-3, True)])
def test_young_packages_are_refused_by_their_indexs_own_times(days: float, refused: bool) -> None:
    checked = content(PackageRules(minimum_age_days=7))
    wheel = "files.example.org/packages/six-1.17.0-py2.py3-none-any.whl"
    get(checked, "pypi.org/simple/six/", pypi_page("six", f"https://{wheel}", uploaded=ago(days)), PIP)
    get(checked, "registry.npmjs.org/tool", npm_page("tool", {"1.0.0": ago(days)}), SHORT)
    entry = {"name": "serde", "vers": "1.0.0", "cksum": SHA256, "pubtime": ago(days)}
    get(checked, "index.crates.io/se/rd/serde", json.dumps(entry).encode())
    for url in (
        wheel, wheel + ".metadata", "registry.npmjs.org/tool/-/tool-1.0.0.tgz",
        "crates.io/api/v1/crates/serde/1.0.0/download",
    ):  # fmt: skip
        reason = refusal(checked, url)
        assert ("was uploaded" in reason and "wants 7" in reason) if refused else reason == ""


def test_without_times_the_last_change_counts_and_without_that_it_is_let_through() -> None:
    checked = content(PackageRules(minimum_age_days=7))
    to = Destination("registry.npmjs.org", 443)
    young, old = "Mon, 21 Sep 2026 10:00:00 GMT", "Mon, 01 Jun 2026 10:00:00 GMT"
    for value, allowed in ((young, False), (old, True), ("nonsense", True), ("", True)):
        watch = checked.watch(to, "GET", "/tool/-/tool-1.0.0.tgz", [])
        assert watch is not None
        decision = watch.start(200, [("Last-Modified", value)])
        assert decision.allowed is allowed and (allowed or "was uploaded" in decision.reason)
        assert bool(watch.end()) is allowed  # what was refused was not fetched
    get(checked, "registry.npmjs.org/tool", npm_page("tool", {"1.0.0": ago(30)}))
    watch = checked.watch(to, "GET", "/tool/-/tool-1.0.0.tgz", [])
    assert watch is not None and watch.start(200, [("Last-Modified", young)]).allowed  # the index knows better
    deb = checked.watch(to, "GET", "/pool/ab_1_all.deb", [])
    assert deb is not None and deb.start(200, [("Last-Modified", young)]).allowed  # security fixes are young


def test_requests_are_changed_so_that_the_answer_can_be_read() -> None:
    npm, pypi = Destination("registry.npmjs.org", 443), Destination("pypi.org", 443)
    sent: Headers = [("accept", SHORT), ("accept-encoding", "gzip, deflate, br"), ("if-none-match", '"1"'), ("x", "y")]
    aged = content(PackageRules(minimum_age_days=7))
    assert aged.outgoing(npm, "GET", "/tool", sent, b"").headers == [
        ("accept", "application/json"), ("accept-encoding", "gzip"), ("x", "y"),
    ]  # fmt: skip
    assert content().outgoing(npm, "GET", "/tool", sent, b"").headers == [
        ("accept", SHORT), ("accept-encoding", "gzip"), ("if-none-match", '"1"'), ("x", "y"),
    ]  # fmt: skip
    assert aged.outgoing(pypi, "GET", "/simple/six/", [("Accept", PIP)], b"").headers == [("Accept", PIP)]
    file = aged.outgoing(pypi, "GET", "/packages/six-1-py3-none-any.whl", sent, b"").headers
    assert ("accept-encoding", "identity") in file and ("accept", SHORT) in file
    apt: Headers = [("if-modified-since", "Mon, 01 Jun 2026 10:00:00 GMT")]
    assert aged.outgoing(Destination("deb.debian.org", 443), "GET", "/d/Packages.xz", apt, b"").headers == apt
    assert aged.outgoing(pypi, "GET", "/other", sent[1:], b"").headers == sent[1:]
