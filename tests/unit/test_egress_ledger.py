"""What was fetched is written down with its digest, and compared with what the index promised."""

from __future__ import annotations

import gzip
import hashlib
import json
import lzma

import pytest
from fetching import FILE, NOW, PIP, SHA256, SHORT, ago, content, get, npm_page, only, pypi_page

from vmsandbox.egress import ledger
from vmsandbox.egress.values import Destination, EgressKind, PackageRules


def test_pip_by_json_has_digest_index_and_time() -> None:
    checked = content()
    url = "files.example.org/packages/six-1.17.0-py2.py3-none-any.whl"
    assert get(checked, "pypi.org/simple/six/", pypi_page("six", f"https://{url}", uploaded=ago(3)), PIP) == []
    event = only(get(checked, url, FILE))
    assert (event.kind, event.host, event.received, event.status) == (
        EgressKind.PACKAGE,
        "files.example.org",
        len(FILE),
        200,
    )
    assert event.more == {
        "ecosystem": "pypi", "name": "six", "version": "1.17.0", "index": "pypi.org", "digest": f"sha256:{SHA256}",
        "promised": f"sha256:{SHA256}", "uploaded": f"{NOW - 3 * 86400:.0f}",
    }  # fmt: skip


def test_pip_by_html_with_relative_addresses_of_a_mirror() -> None:
    checked = content()
    page = f"""<!DOCTYPE html><html><body><a class=x
      href="../../files/foo-2.0.tar.gz?a=1&amp;b=2#sha256={SHA256}" data-x='1'>foo-2.0.tar.gz</a></body></html>"""
    get(
        checked,
        "mirror.example.org/team/simple/foo/",
        gzip.compress(page.encode()),
        answer=[("content-encoding", "gzip")],
    )
    # Its name alone would be that of any archive: the index said what it is.
    event = only(get(checked, "mirror.example.org/team/files/foo-2.0.tar.gz?a=1&b=2", FILE))
    assert event.more["name"] == "foo" and event.more["version"] == "2.0"
    assert event.more["promised"] == event.more["digest"] == f"sha256:{SHA256}"


def test_another_file_than_the_index_promised_is_an_alert() -> None:
    checked = content()
    url = "pypi.org/packages/six-1.17.0-py2.py3-none-any.whl"
    get(checked, "pypi.org/simple/six/", pypi_page("six", f"https://{url}"))
    package, alert = get(checked, url, FILE + b"!")
    assert package.kind is EgressKind.PACKAGE and package.more["promised"] == f"sha256:{SHA256}"
    assert alert.kind is EgressKind.ALERT and "not what its index promised" in alert.more["what"]
    assert alert.more["got"] == "sha256:" + hashlib.sha256(FILE + b"!").hexdigest()


def test_a_promise_follows_a_redirect() -> None:
    checked = content()
    url = "pypi.org/packages/six-1.17.0-py2.py3-none-any.whl"
    get(checked, "pypi.org/simple/six/", pypi_page("six", f"https://{url}"))
    assert get(checked, url, b"", answer=[("location", "https://cdn.example.org/blob/17?sig=1")], status=302) == []
    # The place that it leads to need not look like a package at all.
    events = get(checked, "cdn.example.org/blob/17?sig=1", FILE + b"!")
    assert [event.kind for event in events] == [EgressKind.PACKAGE, EgressKind.ALERT]
    assert events[0].more["name"] == "six"


@pytest.mark.parametrize("sha1", [False, True])
def test_npm_by_packument_with_its_own_digests(sha1: bool) -> None:
    checked = content()
    get(checked, "registry.npmjs.org/@scope%2Ftool", npm_page("@scope/tool", {"1.2.3": ago(9)}, sha1=sha1), SHORT)
    url = "registry.npmjs.org/@scope/tool/-/tool-1.2.3.tgz"
    event = only(get(checked, url, FILE))
    assert event.more["name"] == "@scope/tool" and event.more["digest"] == f"sha256:{SHA256}"
    assert event.more["promised"].startswith("sha1:" if sha1 else "sha512:")
    assert [one.kind for one in get(checked, url, FILE + b"!")] == [EgressKind.PACKAGE, EgressKind.ALERT]


PACKAGES = f"""Package: git
Version: 1:2.39.5-0+deb12u1
Description: fast
 Filename: pool/fake_1_all.deb
Filename: pool/main/g/git/git_2.39.5-0+deb12u1_amd64.deb
SHA256: {SHA256}
Size: 1

Package: other
Filename: pool/main/o/other_1_amd64.deb
SHA256: {"0" * 64}

"""


@pytest.mark.parametrize("pack", [bytes, gzip.compress, lzma.compress])
@pytest.mark.parametrize(
    ("index", "pool"),
    [
        ("deb.debian.org/debian/dists/bookworm/main/binary-amd64/Packages.xz", "deb.debian.org/debian/"),
        (
            "deb.debian.org/debian/dists/bookworm/main/binary-amd64/by-hash/SHA256/" + "ab" * 32,
            "deb.debian.org/debian/",
        ),
        ("apt.example.org/stable/Packages.gz", "apt.example.org/stable/"),
    ],
)
def test_apt_by_packages_files(index: str, pool: str, pack: object) -> None:
    checked = content()
    assert get(checked, index, pack(PACKAGES.encode())) == []  # type: ignore[operator]
    event = only(get(checked, pool + "pool/main/g/git/git_2.39.5-0+deb12u1_amd64.deb", FILE))
    assert event.more["promised"] == f"sha256:{SHA256}" and event.more["ecosystem"] == "debian"
    assert len(get(checked, pool + "pool/main/o/other_1_amd64.deb", FILE)) == 2


def test_cargo_by_sparse_index_and_redirected_download() -> None:
    checked = content()
    lines = [{"name": "serde", "vers": "1.0.0", "cksum": "0" * 64}, {"name": "serde", "vers": "1.0.1", "cksum": SHA256}]
    get(checked, "index.crates.io/se/rd/serde", "\n".join(map(json.dumps, lines)).encode())
    event = only(get(checked, "static.crates.io/crates/serde/1.0.1/download", FILE))
    assert event.more["promised"] == f"sha256:{SHA256}" and event.more["index"] == "index.crates.io"
    assert len(get(checked, "crates.io/api/v1/crates/serde/1.0.0/download", FILE)) == 2


def test_what_is_not_whole_is_written_down_without_a_digest() -> None:
    checked = content()
    url = "pypi.org/packages/six-1.17.0-py2.py3-none-any.whl"
    get(checked, "pypi.org/simple/six/", pypi_page("six", f"https://{url}"))
    for answer, status in (([("content-length", "99999")], 200), ([("content-range", "bytes 0-9/99")], 206)):
        event = only(get(checked, url, FILE, answer=answer, status=status))
        assert event.more["partial"] == "yes" and "digest" not in event.more
    watch = checked.watch(Destination("pypi.org", 443), "GET", "/" + url.partition("/")[2], [])
    assert watch is not None and watch.start(200, []).allowed
    watch.feed(FILE[:10])
    assert only(watch.end(whole=False)).more["partial"] == "yes"
    assert get(checked, url, b"", status=304) == get(checked, url, b"no", status=404) == []
    event = only(get(checked, url, gzip.compress(FILE), answer=[("content-encoding", "gzip")]))
    assert event.more["encoded"] == "gzip" and "promised" not in event.more
    assert content().watch(Destination("pypi.org", 443), "HEAD", "/packages/a-1-py3-none-any.whl", []) is None


@pytest.mark.parametrize(
    "page",
    [
        b"", b"{", b"[]", b"null", b"{" * 100_000, b'{"files": 1}', b'{"files": [1, {"url": 1}, {"url": "http://["}]}',
        b'{"files": [{"url": "x-1-py3-none-any.whl", "hashes": [], "upload-time": 7}]}',
        b"<a href='http://[x'>", b"\xff" * 999,
        b'{"files": [{"url": "x-1-py3-none-any.whl", "hashes": {"sha256": "zz"}, "upload-time": "yesterday"}]}',
    ],
)  # fmt: skip
def test_pages_that_are_no_index_promise_nothing(page: bytes) -> None:
    for index, url in (
        ("pypi.org/simple/x/", "pypi.org/simple/x/x-1-py3-none-any.whl"),
        ("registry.npmjs.org/x", "registry.npmjs.org/x/-/x-1.0.0.tgz"),
        ("a.example/3/x/xyz", "a.example/xyz-1.0.0.crate"),
        ("a.example/Packages", "a.example/xy_1_all.deb"),
    ):
        checked = content(PackageRules(minimum_age_days=7))
        assert get(checked, index, page) == []
        assert "promised" not in only(get(checked, url, FILE)).more


def test_what_an_index_says_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger, "_MOST_PROMISES", 1500)
    checked = content()
    url = "pypi.org/packages/six-1.17.0-py2.py3-none-any.whl"
    page = pypi_page("six", f"https://{url}")
    bomb = gzip.compress(page[:-1] + b" " * (30 << 20) + b"}")
    assert len(bomb) < 100_000
    get(checked, "pypi.org/simple/six/", bomb, answer=[("content-encoding", "gzip")])
    assert "promised" not in only(get(checked, url, FILE)).more
    get(checked, "apt.example.org/Packages", b"x" * (1 << 20))
    many = {str(number): "2020-01-01T00:00:00Z" for number in range(1000)}
    for name in ("a", "b", "c"):
        get(checked, f"registry.npmjs.org/{name}", npm_page(name, many))
    assert len(checked._ledger._promises) == 1500


def test_a_packages_file_that_unpacks_without_end_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    url = "apt.example.org/pool/main/g/git/git_2.39.5-0+deb12u1_amd64.deb"
    checked = content()
    get(checked, "apt.example.org/Packages.gz", gzip.compress(bytes(2 << 20) + b"\n\n" + PACKAGES.encode()))
    assert "promised" not in only(get(checked, url, FILE)).more
    monkeypatch.setattr(ledger, "_LARGEST_DEBIAN", 2000)
    get(checked, "apt.example.org/Packages", b"A: b\n\n" * 500 + PACKAGES.encode())
    assert "promised" not in only(get(checked, url, FILE)).more
    get(checked, "apt.example.org/Packages", PACKAGES.encode())
    assert "promised" in only(get(checked, url, FILE)).more
