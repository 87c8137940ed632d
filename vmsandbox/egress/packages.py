"""Recognises what package managers fetch, by the shape of the path, and says whether the policy lets them.

Without shapes only the public registries would be recognised; a mirror of one's own (which is what a careful company
uses) would have no ledger, no deny list and no minimum age. Sources: PEP 427, 503, 658 and 691 for pypi; npm's
registry API and `package-metadata`; Debian's repository format; cargo's registry index and web API.
"""

from __future__ import annotations

import json
import re
from enum import StrEnum
from typing import NamedTuple
from urllib.parse import unquote

from vmsandbox.egress.paths import glob_matches
from vmsandbox.egress.values import Decision, PackageRules

PACKAGES = "packages"
ECOSYSTEMS = ("pypi", "npm", "debian", "crates")
DAY = 86_400

_NPM_HOSTS = frozenset({"registry.npmjs.org", "registry.npmjs.com", "registry.yarnpkg.com"})
_NPM_SHORT = "application/vnd.npm.install-v1+json"  # a packument without times
_PYPI_NAME = r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?"
_WHEEL = re.compile(r"([A-Za-z0-9._]+)-([^-]+)(?:-[0-9][^-]*)?-[^-]+-[^-]+-[^-]+\.whl(\.metadata)?")
_SDIST = re.compile(rf"({_PYPI_NAME})-([0-9][^-]*)\.(?:tar\.gz|tar\.bz2|tar\.xz|tgz|zip)(\.metadata)?")
_EGG = re.compile(r"([A-Za-z0-9._]+)-([^-]+)-py[0-9.]+(?:-[^/]*)?\.egg")
_NPM_NAME = re.compile(r"[A-Za-z0-9~][A-Za-z0-9._~-]*")
_CRATE = re.compile(r"([A-Za-z][A-Za-z0-9_-]*)-([0-9]+\.[0-9]+\.[0-9]+[^/]*)\.crate")
_CRATE_NAME = re.compile(r"[a-z0-9][a-z0-9_-]*")
_DEB = re.compile(r"([a-z0-9][a-z0-9+.-]+)_([^_]+)_([a-z0-9-]+)\.u?deb")
_DEBIAN_INDEX = re.compile(r"Packages(?:\.(?:gz|xz|bz2|lzma|zst))?")


class Part(StrEnum):
    """What of a package is fetched."""

    INDEX = "index"  # the list of its versions and files
    FILE = "file"
    ABOUT = "about"  # a file's metadata, beside it (PEP 658)


class Fetch(NamedTuple):
    """One request of a package manager.

    name: canonical; empty in an index of everything. version: empty in an index.
    """

    ecosystem: str
    part: Part
    name: str
    version: str = ""

    def __str__(self) -> str:
        return f"{self.ecosystem}:{self.name}" + (f" {self.version}" if self.version else "")


def plain_path(path: str) -> str:
    """The path as servers read it: without its query, decoded, without empty and dot segments."""
    segments: list[str] = []
    for segment in unquote(path.partition("?")[0]).split("/"):
        if segment == "..":
            segments = segments[:-1]
        elif segment not in ("", "."):
            segments.append(segment)
    return "/" + "/".join(segments)


def recognise(host: str, path: str, accept: str = "") -> Fetch | None:
    """What a package manager fetches with this path, or None. accept: of the request's headers."""
    segments = plain_path(path).split("/")[1:]
    for shape in (_debian, _crates, _pypi):
        if (fetch := shape(segments)) is not None:
            return fetch
    return _npm(segments, host, _NPM_SHORT in accept)


def canonical(ecosystem: str, name: str) -> str:
    """A package's name in its one form; a glob of names too."""
    if ecosystem == "pypi":
        return re.sub(r"[-_.]+", "-", name).lower()  # PEP 503
    if ecosystem == "crates":
        return name.lower().replace("_", "-")  # crates.io takes both for the same
    return name.lower()


def _pypi(segments: list[str]) -> Fetch | None:
    last = segments[-1]
    if len(segments) >= 2 and segments[-2] == "simple" and re.fullmatch(_PYPI_NAME, last):
        return Fetch("pypi", Part.INDEX, canonical("pypi", last))
    if len(segments) >= 3 and last == "json" and "pypi" in segments[-4:-1]:
        return Fetch("pypi", Part.INDEX, canonical("pypi", segments[segments.index("pypi") + 1]))
    return pypi_file(last, "packages" in segments[:-1])


def pypi_file(name: str, source_too: bool) -> Fetch | None:
    """A distribution by its file name. source_too: source archives as well; their names are those of any archive."""
    match = _WHEEL.fullmatch(name) or _EGG.fullmatch(name) or (_SDIST.fullmatch(name) if source_too else None)
    if match is None:
        return None
    part = Part.ABOUT if name.endswith(".metadata") else Part.FILE
    return Fetch("pypi", part, canonical("pypi", match[1]), match[2])


def _npm(segments: list[str], host: str, asks_for_packument: bool) -> Fetch | None:
    if len(segments) >= 3 and segments[-2] == "-" and segments[-1].endswith(".tgz"):
        bare, scope = segments[-3], segments[-4] if len(segments) >= 4 else ""
        if segments[-1].startswith(bare + "-"):
            name = f"{scope}/{bare}" if scope.startswith("@") else bare
            return Fetch("npm", Part.FILE, canonical("npm", name), segments[-1][len(bare) + 1 : -4])
    if not (asks_for_packument or host in _NPM_HOSTS):
        return None
    if not asks_for_packument:  # from the root on, where a version may follow the name
        segments = segments[: 2 if segments[0].startswith("@") else 1]
    scoped = len(segments) >= 2 and segments[-2].startswith("@")
    if not _NPM_NAME.fullmatch(segments[-1]):
        return None
    return Fetch("npm", Part.INDEX, canonical("npm", "/".join(segments[-2:] if scoped else segments[-1:])))


def _debian(segments: list[str]) -> Fetch | None:
    if match := _DEB.fullmatch(segments[-1]):
        return Fetch("debian", Part.FILE, match[1], match[2])
    by_hash = len(segments) >= 4 and segments[-3] == "by-hash" and segments[-4].startswith("binary-")
    if by_hash or _DEBIAN_INDEX.fullmatch(segments[-1]):
        return Fetch("debian", Part.INDEX, "")
    return None


def _crates(segments: list[str]) -> Fetch | None:
    last = segments[-1]
    if match := _CRATE.fullmatch(last):
        return Fetch("crates", Part.FILE, canonical("crates", match[1]), match[2])
    if len(segments) >= 4 and last == "download" and segments[-4] == "crates":
        return Fetch("crates", Part.FILE, canonical("crates", segments[-3]), segments[-2])
    if _CRATE_NAME.fullmatch(last):
        folders = [str(len(last))] if len(last) < 3 else ["3", last[0]] if len(last) == 3 else [last[:2], last[2:4]]
        if segments[-1 - len(folders) : -1] == folders:
            return Fetch("crates", Part.INDEX, canonical("crates", last))
    return None


def by_name(rules: PackageRules, fetch: Fetch) -> Decision | None:
    """A refusal for the package's name, or None. Deny wins over allow.

    Of a page of PyPI's index pip shows no refusal ("no matching distribution", and people look elsewhere): the page
    passes, and each of its files is refused with the reason, which pip shows.
    """
    if not fetch.name or (fetch.ecosystem == "pypi" and fetch.part is Part.INDEX):
        return None
    if glob := next((one for one in rules.deny if _covers(one, fetch)), None):
        return Decision(False, PACKAGES, f"the policy denies the package {fetch.ecosystem}:{fetch.name} ({glob})")
    if rules.allow is not None and not any(_covers(one, fetch) for one in rules.allow):
        reason = f"the policy does not allow the package {fetch.ecosystem}:{fetch.name}"
        return Decision(False, PACKAGES, reason, _remedy({"allow": [f"{fetch.ecosystem}:{fetch.name}"]}))
    return None


def by_age(rules: PackageRules, fetch: Fetch, uploaded: float | None, now: float) -> Decision | None:
    """A refusal because it was uploaded too recently (seconds since the epoch; None: not known), or None.

    Debian's indexes have no times, and its young packages are mostly the fixes of its security team: never refused.
    """
    if rules.minimum_age_days <= 0 or uploaded is None or fetch.part is Part.INDEX or fetch.ecosystem == "debian":
        return None
    days = max(0.0, (now - uploaded) / DAY)
    if days >= rules.minimum_age_days:
        return None
    reason = (
        f"{fetch} was uploaded {days:.1f} days ago; the policy wants {rules.minimum_age_days:g}: ask for an older "
        "version" + (", or use npm's --before" if fetch.ecosystem == "npm" else "")
    )
    return Decision(False, PACKAGES, reason, _remedy({"minimum_age_days": int(days)}))


def asked(fetch: Fetch, rules: PackageRules, headers: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """The request's headers, so that the answer can be read here and has times where they are needed."""
    found = []
    for name, value in headers:
        low = name.lower()
        if low == "accept-encoding":
            value = "gzip" if fetch.part is Part.INDEX and "gzip" in value.lower() else "identity"
        elif fetch.part is Part.INDEX and fetch.ecosystem != "debian" and rules.minimum_age_days > 0:
            if low in ("if-none-match", "if-modified-since"):
                continue  # "not modified" would say nothing about the times
            if low == "accept" and fetch.ecosystem == "npm" and _NPM_SHORT in value:
                value = "application/json"  # the whole packument, which has them
        found.append((name, value))
    return found


def _covers(glob: str, fetch: Fetch) -> bool:
    ecosystem, colon, name = glob.partition(":")
    if colon and ecosystem != fetch.ecosystem:
        return False
    return glob_matches(canonical(fetch.ecosystem, name if colon else glob), fetch.name)


def _remedy(packages: dict[str, object]) -> str:
    return json.dumps({"sandbox": {"network": {"packages": packages}}})
