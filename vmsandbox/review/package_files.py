"""What people write about the packages that they want: requirements, pyproject.toml, package.json and so on.

Source of the formats: PEP 508, 621 and 735, pip's, poetry's, npm's, Cargo's, Go's and Composer's documentation.
"""

from __future__ import annotations

import re

from vmsandbox.review.packages import Collected, Packages, lines_of, list_of, read_json, read_toml, table_of

_REQUIREMENT = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]*)\s*(\[[^\]]*\])?\s*(.*)", re.DOTALL)


def python_name(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()  # PEP 503


def _requirement(found: Collected, line: object, group: str = "") -> None:
    """One requirement (PEP 508), or whatever else pip takes as one line."""
    if not isinstance(line, str):
        found.add("(other)", line, group)
        return
    text = line.strip()
    if match := _REQUIREMENT.fullmatch(text):
        found.add(python_name(match[1]), (match[3].strip() or "any version") + (match[2] or ""), group)
    elif text:
        found.add(text, "any version", group)


def requirements(data: bytes) -> Packages:
    """pip's requirements file: comments, options (`-r`, `--index-url`: they count as packages) and continuations."""
    found = Collected()
    joined = data.decode("utf-8", "replace").replace("\r\n", "\n").replace("\\\n", " ")
    for line in joined.split("\n"):
        text = (
            line.partition("#")[0].strip() if line.lstrip().startswith("#") else re.split(r"\s#", line, maxsplit=1)[0]
        )
        requirement, *hashes = text.strip().split(" --hash=")
        if requirement.startswith("-"):
            option, _, value = requirement.replace("=", " ", 1).partition(" ")
            found.add(option, value.strip() or "given", "")
        elif requirement:
            _requirement(found, requirement, " ".join(sorted(one.strip() for one in hashes)))
    return found.done()


def pyproject(data: bytes) -> Packages:
    found = Collected()
    document = read_toml(data)
    project = table_of(document.get("project"))
    for one in list_of(project.get("dependencies")):
        _requirement(found, one)
    for group, members in table_of(project.get("optional-dependencies")).items():
        for one in list_of(members):
            _requirement(found, one, group)
    for group, members in table_of(document.get("dependency-groups")).items():
        for one in list_of(members):
            _requirement(found, one, group)
    for one in list_of(table_of(document.get("build-system")).get("requires")):
        _requirement(found, one, "build-system")
    tools = table_of(document.get("tool"))
    poetry = table_of(tools.get("poetry"))
    groups = {"": poetry, "dev": {"dependencies": poetry.get("dev-dependencies")}, **table_of(poetry.get("group"))}
    for group, table in groups.items():
        for name, version in table_of(table_of(table).get("dependencies")).items():
            found.add(python_name(name), version, group)
    for tool, key in (
        ("uv", "sources"),
        ("uv", "index"),
        ("poetry", "source"),
        ("pdm", "source"),
        ("pdm", "dev-dependencies"),
    ):
        if (value := table_of(tools.get(tool)).get(key)) is not None:
            found.add(f"tool.{tool}.{key}", value)
    return found.done()


def pipfile(data: bytes) -> Packages:
    found = Collected()
    for group, packages in read_toml(data).items():
        if group == "source":
            found.add("(sources)", packages)
        elif isinstance(packages, dict) and group not in ("requires", "scripts"):
            for name, version in packages.items():
                found.add(python_name(name), version, group)
    return found.done()


def package_json(data: bytes) -> Packages:
    found = Collected()
    document = read_json(data)
    for key in ("dependencies", "devDependencies", "peerDependencies", "optionalDependencies"):
        for name, version in table_of(document.get(key)).items():
            found.add(name, version, key)
    for key in ("overrides", "resolutions", "bundledDependencies", "bundleDependencies", "packageManager"):
        if key in document:
            found.add(key, document[key])
    return found.done()


def cargo_toml(data: bytes) -> Packages:
    found = Collected()
    document = read_toml(data)
    places = [("", document), ("workspace", table_of(document.get("workspace")))]
    places += [(target, table_of(table)) for target, table in table_of(document.get("target")).items()]
    for place, table in places:
        for key in ("dependencies", "dev-dependencies", "build-dependencies", "patch", "replace"):
            for name, version in table_of(table.get(key)).items():
                found.add(name, version, f"{place} {key}")
    return found.done()


_GO_REQUIRE = re.compile(r"(?:require\s+)?([^\s()\"]+)\s+(v[^\s]+)(?:\s*//.*)?")


def go_mod(data: bytes) -> Packages:
    found = Collected()
    block = ""
    for line in lines_of(data):
        text = line.strip()
        if match := re.fullmatch(r"(require|replace|exclude|retract|tool|godebug)\s*\(", text):
            block = match[1]
        elif text == ")":
            block = ""
        elif not text or text.startswith("//"):
            continue
        elif (block == "require" or text.startswith("require ")) and (match := _GO_REQUIRE.fullmatch(text)):
            found.add(match[1], match[2])
        elif block or text.startswith(("replace ", "toolchain ", "go ", "exclude ", "tool ", "retract ")):
            words = text.split(None, 1) if not block else [block, text]
            found.add(f"({words[0]})", words[-1])
    return found.done()


def composer_json(data: bytes) -> Packages:
    found = Collected()
    document = read_json(data)
    for key in ("require", "require-dev", "replace", "conflict", "provide"):
        for name, version in table_of(document.get(key)).items():
            found.add(name, version, key)
    if "repositories" in document:
        found.add("(repositories)", document["repositories"])
    return found.done()
