"""The one parser of hosts: one canonical form or none, and which addresses are never dialled."""

from __future__ import annotations

import ipaddress
import string

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmsandbox.egress.hosts import (
    BadHostError,
    is_address,
    parse_address,
    parse_destination,
    parse_entry,
    parse_host,
    parse_pattern,
    pattern_matches,
    patterns_for,
    precision,
    refused_address,
)
from vmsandbox.egress.values import Destination

LABEL = st.from_regex(r"[a-z](?:[a-z0-9]{0,8}[a-z0-9])?", fullmatch=True)
NAMES = st.lists(LABEL, min_size=1, max_size=5).map(".".join)
HOSTS = NAMES | st.ip_addresses().map(lambda one: parse_address(str(one)))
# What has ever stood between a checked host and another one.
NASTY = st.text(
    st.sampled_from([*"aZ09.-_:@[]%/\\#?* \t\n\x00\x7f\u00e9\u3002\uff0e\u2024\u00df\u0130\u212a\u200d"]), max_size=24
)


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("example.org", "example.org", 443),
        ("EXAMPLE.Org:8443", "example.org", 8443),
        ("192.0.2.1", "192.0.2.1", 443),
        ("[2001:DB8::0:1]:80", "2001:db8::1", 80),
        ("[2001:db8::1]", "2001:db8::1", 443),
        ("[::ffff:192.0.2.1]", "192.0.2.1", 443),
        ("[::ffff:7f00:1]:1", "127.0.0.1", 1),
        ("xn--mnchen-3ya.example", "xn--mnchen-3ya.example", 443),
        ("xn--strae-oqa.de", "xn--strae-oqa.de", 443),  # IDNA 2008 alone has it; on the wire it is ASCII
        ("r3---sn-4g5e.example:65535", "r3---sn-4g5e.example", 65535),
        ("localhost", "localhost", 443),
        ("1and1.example", "1and1.example", 443),
        ("0x7f.example", "0x7f.example", 443),
        ("a" * 63 + ".example", "a" * 63 + ".example", 443),
        (".".join(["a" * 49] * 5) + ".org", ".".join(["a" * 49] * 5) + ".org", 443),
    ],
)
def test_what_is_a_destination(text: str, host: str, port: int) -> None:
    assert parse_destination(text, 443) == Destination(host, port)


@pytest.mark.parametrize(
    "text",
    [
        "", ".", "..", "example.org.", "example.org..", ".example.org", "a..b", "127.0.0.1.",
        "example.org\x00", "example.org\x00.evil.org", "exa mple.org", " example.org", "example.org\n",
        "example.org\r\nHost: x",
        "\texample.org", "example\x7f.org", "example.org\u00a0",
        "user@example.org", "example.org@evil.org", "example.org%00", "example.org%2eevil.org", "[fe80::1%eth0]",
        "fe80::1%1",
        "[fe80::1%25eth0]:80", "http://example.org", "example.org/", "example.org/x", "example.org\\x",
        "example.org#", "example.org?x",
        "a_b.example.org", "_dmarc.example.org", "-a.example", "a-.example", "*.example.org", "*", "a,b", "a;b",
        "example!org",
        "127.1", "127.0.1", "0", "1", "2130706433", "017700000001", "0x7f000001", "0X7F000001", "0x7f.0.0.1",
        "0177.0.0.1", "127.0.0.01",
        "127.0.0.256", "1.2.3.4.5", "1.2.3", "0x", "example.0x1", "example.123", "1.2.3.4.", "٣.٣.٣.٣",
        "１２７.０.０.１",
        "[127.0.0.1]", "[::1", "::1]", "[::1]]", "[[::1]]", "[]", "[::1]x", "[::1]x80", "[::1].example.org",
        "[example.org]",
        "::1", "2001:db8::1", "[::g]",
        "[1::2::3]", "[::ffff:127.1]", "[:::]", "[v1.x]",
        "example.org:", "example.org:0", "example.org:65536", "example.org:080", "example.org:+80", "example.org:-1",
        "example.org:80:80",
        "example.org: 80", "example.org:８０", "example.org:1e2", "example.org:http", "[::1]:", "[::1]:0",
        "example.org:999999999999",
        "münchen.example", "example。org", "example．org", "ｅxample.org", "EXAMPLE.ORG\u200b", "\u212aelvin.example",
        "ﬁ.example",
        "xn--", "xn--.example", "xn--a.example", "xn--zz--zz.example", "xn--example-.org", "xn--evil-com-/x",
        "xn--a-ecp.ru\u00ad",
        "xn--mnchen-3yA\u0301", "a" * 64 + ".example", "a." * 126 + "ab", "a" * 10_000,
    ],
)  # fmt: skip
def test_what_is_none(text: str) -> None:
    with pytest.raises(BadHostError):
        parse_destination(text, 443)
    with pytest.raises(BadHostError):
        parse_host(text)


def test_an_a_label_has_one_form() -> None:
    upper = "xn--" + "M\u00dcNCHEN".encode("punycode").decode(
        "ascii"
    )  # decodes to capitals, which are mapped elsewhere
    wide = "xn--" + "\uff45vil\uff0ecom".encode("punycode").decode("ascii")  # full-width, with a dot in it
    slash = "xn--" + "b\u00fc/x".encode("punycode").decode("ascii")
    for label in (upper.lower(), wide.lower(), slash.lower()):
        with pytest.raises(BadHostError):
            parse_destination(f"{label}.example", 443)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a@b.org", "user information"),
        ("a.org%00", "percent"),
        ("a b.org", "space or control"),
        ("a.org\x00", "space or control"),
        ("a.org.", "a dot at the end"),
        ("127.1", "four decimal numbers"),
        ("a_b.org", "letters, digits and hyphens"),
        ("[::1", "brackets"),
        ("::1", "brackets"),
        ("\u00e9.org", "not ASCII"),
    ],
)
def test_what_is_wrong_is_said(text: str, said: str) -> None:
    with pytest.raises(BadHostError) as caught:
        parse_destination(text, 443)
    assert said in caught.value.brief


def test_a_port_has_to_be_there_or_known() -> None:
    assert parse_destination("a.example:1").port == 1
    with pytest.raises(BadHostError):
        parse_destination("a.example")
    with pytest.raises(BadHostError):
        parse_host("a.example:443")


@settings(deadline=None)
@given(HOSTS, st.integers(1, 65535))
def test_the_canonical_form_is_read_as_itself(host: str, port: int) -> None:
    to = Destination(host, port)
    assert parse_destination(str(to)) == to
    assert parse_destination(str(to).upper()) == to


@settings(deadline=None)
@given(NASTY | st.text(max_size=40))
def test_whatever_is_read_is_canonical_and_plain(text: str) -> None:
    try:
        to = parse_destination(text, 443)
    except BadHostError as error:
        assert error.brief.isprintable() and error.brief.isascii()
        return
    assert parse_destination(str(to)) == to
    assert set(to.host) <= set(string.ascii_lowercase + string.digits + "-.:")
    assert not to.host.endswith(".") and len(to.host) <= 253 and 1 <= to.port <= 65535
    # Nothing was mapped: it is what was sent, in lower case, or an address.
    assert to.host in text.lower() or is_address(to.host)
    if is_address(to.host):
        assert str(ipaddress.ip_address(to.host)) == to.host
    assert parse_pattern(f"[{to.host}]" if ":" in to.host else to.host) == to.host


@settings(deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_no_other_spelling_of_an_ipv4_address_is_one(number: int) -> None:
    quads = str(ipaddress.IPv4Address(number)).split(".")
    spellings = [
        str(number),
        hex(number),
        oct(number).replace("0o", "0"),
        ".".join(quads[:3]),
        ".".join(hex(int(quad)) for quad in quads),
        ".".join("0" + quad for quad in quads),
        ".".join([*quads[:2], str(int(quads[2]) * 256 + int(quads[3]))]),
    ]
    for text in spellings:
        with pytest.raises(BadHostError):
            parse_destination(text, 80)
    assert parse_destination(".".join(quads), 80).host == ".".join(quads)


@pytest.mark.parametrize(
    ("text", "pattern", "port"),
    [
        ("Example.ORG", "example.org", None),
        ("example.org.", "example.org", None),
        ("*.Example.org.", "*.example.org", None),
        ("*", "*", None),
        ("*:8443", "*", 8443),
        ("*.example.org:8443", "*.example.org", 8443),
        ("192.0.2.1", "192.0.2.1", None),
        ("[2001:db8::1]:443", "2001:db8::1", 443),
        ("[2001:DB8::1]", "2001:db8::1", None),
        ("München.example", "xn--mnchen-3ya.example", None),
        ("*.bücher.example:80", "*.xn--bcher-kva.example", 80),
        ("пример.example", "xn--e1afmkfd.example", None),
    ],
)
def test_what_a_policy_may_say(text: str, pattern: str, port: int | None) -> None:
    assert parse_entry(text) == (pattern, port)


@pytest.mark.parametrize(
    "text",
    [
        "", "@pypi", "*pypi.org", "py*.org", "*.*.org", "**", "*.", "*..org", "*.192.0.2.1", "*.1", "a.*",
        "example.org:*", "*.[::1]",
        "https://pypi.org", "pypi.org/simple", "straße.de", "faß.example", "ς.example", "a\u200db.example",
        "ｅxample.org", "ﬁsh.example",
        "bu\u0308cher.example", "example。org", "a\u0301..org", "\u2024.org",
        "*." + ".".join(["a" * 49] * 5) + ".orgg", "127.1", "*.0x7f",
        "a\u202eb.example", "example.org..", "2001:db8::1",
    ],
)  # fmt: skip
def test_what_a_policy_may_not_say(text: str) -> None:
    with pytest.raises(BadHostError):
        parse_entry(text)


@pytest.mark.parametrize(
    ("pattern", "covered", "not_covered"),
    [
        ("allowed.com", ["allowed.com"], ["allowed.com.evil", "evilallowed.com", "a.allowed.com", "com", "allowed.co"]),
        (
            "*.allowed.com",
            ["a.allowed.com", "a.b.allowed.com"],
            ["allowed.com", "evilallowed.com", "a.allowed.com.evil"],
        ),
        ("*", ["allowed.com", "192.0.2.1", "2001:db8::1"], []),
        ("192.0.2.1", ["192.0.2.1"], ["192.0.2.11", "1.192.0.2", "192.0.2"]),
    ],
)
def test_what_a_pattern_covers(pattern: str, covered: list[str], not_covered: list[str]) -> None:
    for host in covered:
        assert pattern_matches(pattern, host) and pattern in patterns_for(host)
    for host in not_covered:
        assert not pattern_matches(pattern, host) and pattern not in patterns_for(host)


@settings(deadline=None)
@given(NAMES, NAMES)
def test_covering_is_by_whole_labels(suffix: str, host: str) -> None:
    ours, theirs = suffix.split("."), host.split(".")
    below = len(theirs) > len(ours) and theirs[-len(ours) :] == ours
    assert pattern_matches(f"*.{suffix}", host) is below


@settings(deadline=None)
@given(HOSTS)
def test_patterns_come_most_exact_first_and_are_all_there_are(host: str) -> None:
    found = patterns_for(host)
    ranks = [precision(one) for one in found]
    assert ranks == sorted(set(ranks), reverse=True) and all(pattern_matches(one, host) for one in found)
    assert found[0] == host and found[-1] == "*"


REFUSED = {
    "a loopback address": ["127.0.0.1", "127.255.255.254", "::1", "::ffff:127.0.0.1"],
    "a private address": ["10.0.0.1", "172.16.0.1", "172.31.255.255", "192.168.1.1", "fd12::1", "fc00::1", "fec0::1",
                          "64:ff9b:1::1", "::ffff:10.0.0.1"],
    "a link-local address": ["169.254.1.1", "fe80::1", "febf::1"],
    "a metadata service": ["169.254.169.254", "169.254.170.2", "::ffff:169.254.169.254", "fd00:ec2::254",
                           "100.100.100.200",
                           "168.63.129.16", "192.0.0.192", "fd20:ce::254"],
    "an unspecified address": ["0.0.0.0", "0.1.2.3", "::"],
    "a multicast address": ["224.0.0.1", "239.255.255.255", "ff02::1"],
    "a broadcast address": ["255.255.255.255"],
    "a reserved address": ["240.0.0.1", "192.0.0.8", "::2", "::127.0.0.1", "100::1", "2001:2::1", "2001:20::1",
                           "4000::1", "5f00::1",
                           "192.88.99.1", "e000::1", "::ffff:0:8.8.8.8"],
    "a documentation address": ["192.0.2.1", "198.51.100.7", "203.0.113.255", "2001:db8::1", "3fff::1"],
    "a benchmarking address": ["198.18.0.1", "198.19.255.255"],
    "an address of a carrier's NAT": ["100.64.0.1", "100.127.255.255"],
    "a Teredo address": ["2001:0:808:808::1"],
    "a 6to4 address": ["2002:7f00:1::1", "2002:808:808::1"],
    "a loopback address inside an IPv6 address": ["64:ff9b::127.0.0.1", "2a00::5efe:127.0.0.1",
                                                  "2a00::200:5efe:127.0.0.1"],
    "a metadata service inside an IPv6 address": ["64:ff9b::169.254.169.254", "::ffff:0:169.254.169.254"],
    "no address": ["", "127.1", "localhost", "1.2.3.4%eth0", "fe80::1%eth0", "0x7f000001", "1.2.3.4:80", "[::1]"],
}  # fmt: skip
PUBLIC = ["8.8.8.8", "1.1.1.1", "151.101.0.223", "2a04:4e42::223", "2606:4700::1", "64:ff9b::8.8.8.8",
"2001:4860:4860::8888",
          "172.15.255.255", "172.32.0.0", "100.63.255.255", "100.128.0.0", "11.0.0.0", "9.255.255.255",
          "169.253.255.255",
          "223.255.255.255", "2620:4f:8000::1", "2a00::5efe:8.8.8.8", "::ffff:8.8.8.8"]  # fmt: skip


@pytest.mark.parametrize(("reason", "address"), [(why, one) for why, many in REFUSED.items() for one in many])
def test_addresses_that_are_not_dialled(reason: str, address: str) -> None:
    assert refused_address(address, ()) == reason


@pytest.mark.parametrize("address", PUBLIC)
def test_public_addresses_are(address: str) -> None:
    assert refused_address(address, ()) is None


def test_the_hosts_own_addresses_in_any_spelling() -> None:
    own = ("8.8.8.8", "2A04:4E42:0::223", "2a04:4e42::5%eth0", "nonsense")
    for address in ("8.8.8.8", "::ffff:8.8.8.8", "64:ff9b::808:808", "2a04:4e42::0:223", "2a04:4e42::5"):
        assert refused_address(address, own) == "an address of this host"
    assert refused_address("8.8.4.4", own) is None


@settings(deadline=None)
@given(st.ip_addresses())
def test_nothing_that_the_registries_call_special_is_dialled(
    address: ipaddress.IPv4Address | ipaddress.IPv6Address,
) -> None:
    """The standard library's own opinion, as a second one: whatever it calls not global has to be refused."""
    special = not address.is_global or address.is_multicast or address.is_reserved
    nat64 = isinstance(address, ipaddress.IPv6Address) and address in ipaddress.IPv6Network("64:ff9b::/96")
    mapped = isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None
    if special and not nat64 and not mapped:
        assert refused_address(str(address), ()) is not None


@settings(deadline=None)
@given(st.ip_addresses(v=4))
def test_an_address_inside_another_is_judged_as_itself(address: ipaddress.IPv4Address) -> None:
    plain = refused_address(str(address), ())
    assert refused_address(f"::ffff:{address}", ()) == plain
    assert (refused_address(f"64:ff9b::{address}", ()) is None) == (plain is None)
