"""Reads a devcontainer.json (JSON with comments): what of it hardens becomes a policy.

Without it its runArgs and mounts would be forgotten on the way from a container into a guest. Format: the Dev Container
metadata reference, containers.dev/implementors/json_reference.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vmsandbox.policy.format.checkedjson import CheckedJson
from vmsandbox.policy.importing import takers, takers_session
from vmsandbox.policy.importing.compose import settle, take_key
from vmsandbox.policy.importing.draft import Draft
from vmsandbox.policy.importing.jsonc import plain_json
from vmsandbox.policy.importing.options import read_options
from vmsandbox.policy.importing.shapes import NotUnderstoodError, a_list, a_mapping, a_text
from vmsandbox.policy.importing.table import NO_HOST_FILE, NO_IMAGE, NO_PORTS, ONE_GUEST, WORKER, Key, none
from vmsandbox.policy.importing.texts import options, shown

_HERE = ("${localWorkspaceFolder}", "${localWorkspaceFolderBasename}")


def _run_args(draft: Draft, at: str, value: Any) -> None:
    for one in read_options([a_text(word) for word in a_list(value)], at):
        if one.key is None:
            draft.leave(one.at, f"unknown option or one without its value: {shown(one.text)}")
        else:
            take_key(draft, one.key, one.at, one.value)


def _mounts(draft: Draft, at: str, value: Any) -> None:
    for position, one in enumerate(a_list(value)):
        _mount(draft, f"{at}[{position}]", one)


def _mount(draft: Draft, at: str, value: Any) -> None:
    """`source=…,target=…,type=…`, or the same as an object. The local workspace is the project."""
    given = {
        name: text or "true" for name, text in options(value).items()
    } if isinstance(value, str) else a_mapping(value)  # fmt: skip
    source = str(given.get("source", given.get("src", "")))
    for name in _HERE:
        source = source.replace(name, ".")
    target = next((str(given[key]) for key in ("target", "dst", "destination") if key in given), "")
    if draft.working_dir is not None:
        target = target.replace("${containerWorkspaceFolder}", draft.working_dir)
    for name in given:
        if name in ("consistency", "bind-propagation", "volume-opt", "external", "volume-driver"):
            draft.leave(f"{at} {name}", "nothing is mounted: it has no effect")
        elif name not in ("source", "src", "target", "dst", "destination", "type", "readonly", "ro", "tmpfs-size"):
            draft.leave(f"{at} {shown(name)}", "unknown option of a mount")
    takers.mount(draft, at, {**given, "source": source, "target": target})


def _features(draft: Draft, at: str, value: Any) -> None:
    for name in a_mapping(value):
        nested = "docker" in str(name)
        why = "a container in the guest needs privileges that the worker never has" if nested else NO_FEATURE
        draft.leave(f"{at}.{shown(name)}", why)


def _customizations(draft: Draft, at: str, value: Any) -> None:
    for name in a_mapping(value):
        draft.leave(f"{at}.{shown(name)}", "settings of a tool on the host: `vmsandbox ssh-config` lets it in")


def _user(draft: Draft, at: str, value: Any) -> None:
    if a_text(value) == "root":
        draft.leave(at, WORKER)
    else:
        draft.always(at, f"holds always: {WORKER}")


def _requirements(draft: Draft, at: str, value: Any) -> None:
    known: dict[str, Callable[[Draft, str, Any], None]] = {
        "cpus": takers.cpus, "memory": takers.memory, "storage": takers.disk,
    }  # fmt: skip
    for name, one in a_mapping(value).items():
        if name in known:
            known[name](draft, f"{at}.{name}", one)
        else:
            draft.leave(f"{at}.{shown(name)}", "the guest reaches no device of the host")


def _secrets(draft: Draft, at: str, value: Any) -> None:
    for name in a_mapping(value):
        draft.leave(f"{at}.{shown(name)}", "name it in network.secrets: the guest gets a stand-in for it")


NO_FEATURE = "a feature is installed as root while an image is made: write it into a recipe (images/python-dev.yaml)"
DEVCONTAINER: dict[str, Key] = {
    "runArgs": Key("as the key of a service", "docker run's options: see their table", _run_args),
    "mounts": Key(
        "filesystem.project, filesystem.tmpfs",
        "the one of the local workspace: the project, copied in, not mounted; of type tmpfs: tmpfs; no others",
        _mounts,
    ),
    "workspaceMount": Key("filesystem.project", "`readonly`", _mount),
    "workspaceFolder": Key("", "tells which mount is the project; that lies in ~/projects", takers.working_dir),
    "containerEnv": Key(
        "session.variables, session.environment", "as `environment` of a service", takers_session.environment
    ),
    "remoteEnv": Key("session.variables, session.environment", "the same", takers_session.environment),
    "privileged": Key("", "`false` holds always; `true` is not imported", takers.privileged),
    "capAdd": Key("kernel.capabilities", "as `cap_add`", takers.cap_add),
    "securityOpt": Key("kernel.new_privileges, kernel.seccomp", "as `security_opt`", takers.security_opt),
    "onCreateCommand": Key("session.post_create", "the first part of it", takers_session.commands),
    "updateContentCommand": Key("session.post_create", "the second part of it", takers_session.commands),
    "postCreateCommand": Key(
        "session.post_create", "once per template, in the guest; text, list or object", takers_session.commands
    ),
    "remoteUser": Key("", f"holds always: {WORKER}", _user),
    "containerUser": Key("", f"holds always: {WORKER}", _user),
    "hostRequirements": Key(
        "resources.vcpus, resources.memory, resources.disk", "cpus, memory, storage", _requirements
    ),
    "features": Key("", NO_FEATURE, _features),
    "customizations": Key("", "settings of a tool on the host", _customizations),
    "secrets": Key("", "name them in network.secrets", _secrets),
    **none(NO_IMAGE, "image build dockerFile context"),
    **none("import that file as well", "dockerComposeFile service runServices"),
    **none("has no effect on what may be done", "name $schema"),
    **none("runs on the host, where nothing of a project is run", "initializeCommand"),
    **none("say it after `--`, or in a script of the project", "postStartCommand postAttachCommand"),
    **none(NO_PORTS, "forwardPorts appPort portsAttributes otherPortsAttributes"),
    **none(ONE_GUEST, "init overrideCommand shutdownAction waitFor userEnvProbe updateRemoteUserUID"),
    **none(NO_HOST_FILE, "overrideFeatureInstallOrder"),
}
# In the order in which they run, and what tells about the project first.
_ORDER = ("workspaceFolder", "onCreateCommand", "updateContentCommand", "postCreateCommand")


def read_devcontainer(draft: Draft, content: bytes) -> None:
    """Fill a draft from a devcontainer.json.

    Raises:
        UserInputError: it is no JSON with comments.
    """
    reader = CheckedJson(f"the devcontainer file {draft.source}", "correct the file")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise reader.invalid("not UTF-8 text") from None
    data = reader.parsed(plain_json(text))
    if not isinstance(data, dict):
        raise reader.invalid("not a JSON object")
    if reader.problems:
        raise reader.invalid()
    for key in sorted(data, key=lambda one: _ORDER.index(one) if one in _ORDER else len(_ORDER)):
        known = DEVCONTAINER.get(key)
        if known is None:
            draft.leave(shown(key), "unknown key")
        elif known.take is None:
            draft.leave(key, known.text)
        else:
            try:
                known.take(draft, key, data[key])
            except NotUnderstoodError as error:
                draft.problems.append(f"{key}: {error}")
    settle(draft)
