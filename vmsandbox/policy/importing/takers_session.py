"""What becomes of keys about a session's course: checks, variables, commands. See `takers.py`.

Without them a container's environment would be copied with the secrets in it.
"""

from __future__ import annotations

import shlex
from typing import Any

from vmsandbox.policy.fetchers import bundles_for
from vmsandbox.policy.format.rendering import plain_duration
from vmsandbox.policy.format.words import variable
from vmsandbox.policy.importing.draft import Draft
from vmsandbox.policy.importing.shapes import NotUnderstoodError, a_list, a_mapping, a_number, a_text
from vmsandbox.policy.importing.texts import depends, seconds, secret, shown


def healthcheck(draft: Draft, at: str, value: Any) -> None:
    given = a_mapping(value)
    test = given.get("test")
    if "healthcheck" in draft.sandbox.get("session", {}):
        draft.leave(at, "there is a healthcheck already")
        return
    if given.get("disable") is True or test == ["NONE"]:
        draft.leave(at, "none is asked for")
        return
    for name, one in given.items():
        place, to = f"{at}.{shown(name)}", f"session.healthcheck.{name}"
        if name == "test":
            _health(draft, place, "test", _test(one))
        elif name in ("interval", "timeout"):
            found = seconds(one)
            if found is None:
                raise NotUnderstoodError(f"{name} is not a time: {shown(one)}")
            _health(draft, place, name, plain_duration(found))
        elif name == "retries":
            _health(draft, place, name, int(a_number(one)))
        elif name != "disable":
            draft.leave(place, f"there is no {to}: the first check runs after `interval`")
    if test is None:
        draft.sandbox.get("session", {}).pop("healthcheck", None)
        draft.mapped = [one for one in draft.mapped if not one.key.startswith(f"{at}.")]
        draft.leave(at, "the test itself is in the image: name it")


def environment(draft: Draft, at: str, value: Any) -> None:
    entries = value.items() if isinstance(value, dict) else [str(one).partition("=")[::2] for one in a_list(value)]
    bare = set() if isinstance(value, dict) else {one for one in a_list(value) if "=" not in str(one)}
    for name, one in entries:
        text = None if one is None or name in bare else str(one).lower() if isinstance(one, bool) else str(one)
        _variable(draft, f"{at}.{shown(name)}", str(name), text)


def commands(draft: Draft, at: str, value: Any) -> None:
    """postCreateCommand and its siblings: a text, a list of words, or several by name."""
    if isinstance(value, dict):
        lines = [one if isinstance(one, str) else shlex.join(map(a_text, a_list(one))) for one in value.values()]
    else:
        lines = [value if isinstance(value, str) else shlex.join(map(a_text, a_list(value)))]
    if any("${" in one for one in lines if "Workspace" in one or "localEnv" in one):
        draft.leave(at, "depends on a variable of the host")
        return
    session = draft.sandbox.setdefault("session", {})
    before = session.pop("post_create", None)
    how = "once per template, with what it names of the project (session.post_create_files says more)"
    if bundles := bundles_for(lines):
        how += f"; it fetches packages: allow {', '.join(bundles)} under network"
    draft.set(at, "session.post_create", " && ".join(([before] if before else []) + lines), how)


def _health(draft: Draft, at: str, name: str, value: Any) -> None:
    draft.sandbox.setdefault("session", {}).setdefault("healthcheck", {})[name] = value
    draft.note(at, f"session.healthcheck.{name}")


def _test(value: Any) -> list[str] | str:
    if isinstance(value, str):
        return value.replace("$$", "$")
    words = [a_text(one).replace("$$", "$") for one in a_list(value)]
    if words[:1] == ["CMD"] and len(words) > 1:
        return words[1:]
    if words[:1] == ["CMD-SHELL"] and len(words) == 2:
        return words[1]
    raise NotUnderstoodError("a test begins with CMD or CMD-SHELL")


def _variable(draft: Draft, at: str, name: str, text: str | None) -> None:
    try:
        variable(name)
    except ValueError as error:
        draft.leave(at, str(error))
        return
    same = (f"${name}", f"${{{name}}}", f"${{localEnv:{name}}}")
    if text is None or text in same:
        draft.add(at, "session.environment", name, "as the host has it")
    elif depends(text):
        draft.leave(at, "depends on a variable of the host: name that in session.environment")
    elif secret(name, text):
        why = "looks like a secret: its value is not copied, it passes as the host has it; see network.secrets"
        draft.add(at, "session.environment", name, why)
    elif not text or not text.isprintable():
        draft.leave(at, "an empty value, or one with control characters")
    elif name in (variables := draft.sandbox.setdefault("session", {}).setdefault("variables", {})):
        draft.leave(at, f"{name} is set already")
    else:
        variables[name] = text.replace("$$", "$")
        draft.note(at, "session.variables")
