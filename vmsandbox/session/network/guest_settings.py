"""What a guest is told with its identity: variables, the proxy and the session's authority, in each tool's words.

Without it every tool would have to be taught by hand, and the first one that was not would fail with a certificate
error. Pure: the same values give the same message. Nothing of it is a boundary; guest root may change all of it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from vmsandbox.errors import UserInputError
from vmsandbox.spec import WORKER_UID

PROXY_PORT = 3128
FORWARDED = ("127.0.0.1", PROXY_PORT)  # what the guest's sshd may listen on for the host, and nothing else

BUNDLE = "/etc/ssl/certs/ca-certificates.crt"  # Debian's, which update-ca-certificates makes
OWN_CERTIFICATE = "/usr/local/share/ca-certificates/vmsandbox.crt"  # so that it is in the bundle after that ran, too
PROFILE = "/etc/profile.d/vmsandbox-network.sh"  # root's and other login shells
NO_PROXY = "localhost,127.0.0.1,::1"

# Variables by which tools and libraries are told of certificates: a whole bundle, or one more.
_BUNDLE_VARIABLES = (
    "SSL_CERT_FILE",  # OpenSSL, Go, Rust's native-certs, uv
    "REQUESTS_CA_BUNDLE",
    "CURL_CA_BUNDLE",
    "PIP_CERT",
    "GIT_SSL_CAINFO",
    "CARGO_HTTP_CAINFO",
    "AWS_CA_BUNDLE",
)  # fmt: skip
_EXTRA_VARIABLES = ("NODE_EXTRA_CA_CERTS", "DENO_CERT")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def locale_of(chosen: Mapping[str, str]) -> dict[str, str]:
    """The locale's variables beside the ones that were chosen. Of several SetEnv lines sshd takes the first alone.

    LC_ALL stays where only LANG passes: a guest need not have the host's locale, and would warn of it in every shell.
    """
    if any(name.startswith("LC_") for name in chosen):
        return {"LANG": "C.UTF-8"}  # LC_ALL would outweigh what was chosen
    return {"LANG": "C.UTF-8", "LC_ALL": "C.UTF-8"}


def environment_of(proxy: str, more: Mapping[str, str], chosen: Mapping[str, str]) -> dict[str, str]:
    """The variables of every process of the worker, where there is a network.

    Args:
        proxy: `http://ADDRESS:PORT`.
        more: the session's placeholders.
        chosen: the policy's (`session.variables`); what the network needs outweighs them.

    Raises:
        UserInputError: a name or value cannot be a variable of sshd's SetEnv, or one is both.
    """
    _check_variables({**more, **chosen})
    for name in more.keys() & chosen.keys():
        raise UserInputError(
            f"{name} is a variable of the session and a secret's placeholder",
            details=f"sandbox.session and sandbox.network.secrets both name {name}",
        )
    variables = {**locale_of(chosen), **chosen}
    for name in ("http_proxy", "https_proxy"):
        variables[name] = variables[name.upper()] = proxy
    variables["no_proxy"] = variables["NO_PROXY"] = NO_PROXY
    variables["NODE_USE_ENV_PROXY"] = "1"  # Node 24's own fetch
    variables |= dict.fromkeys(_BUNDLE_VARIABLES, BUNDLE) | dict.fromkeys(_EXTRA_VARIABLES, OWN_CERTIFICATE)
    return variables | dict(more)


def guest_network(
    certificate: str,
    proxy: str,
    more: Mapping[str, str],
    decoys: Mapping[str, str],
    *,
    forwarded: bool,
    chosen: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """The `network` part of the identity message (`cloudinit/guest/vmsandbox-control`).

    Args:
        certificate: PEM of the session's authority.
        proxy: `http://ADDRESS:PORT`, as the guest sees it.
        more: variables beside the tools' own (the secrets' placeholders).
        decoys: files of the worker's, path → text (`egress.canaries`).
        forwarded: sshd may listen on the proxy's port for the host.
        chosen: the policy's variables.
    """
    variables = environment_of(proxy, more, chosen or {})
    sshd = _set_env(variables)
    if forwarded:
        sshd += f"PermitListen {FORWARDED[0]}:{FORWARDED[1]}\n"
    # What nobody asked for is left out: looking for a newer npm, and posting what is installed.
    npm = f"proxy={proxy}\nhttps-proxy={proxy}\ncafile={BUNDLE}\nnoproxy={NO_PROXY}\n"
    npm += "update-notifier=false\naudit=false\nfund=false\n"
    cargo = f'[http]\nproxy = "{proxy}"\ncainfo = "{BUNDLE}"\n'
    files = {
        OWN_CERTIFICATE: certificate,
        PROFILE: _exports(variables),
        "/etc/apt/apt.conf.d/90vmsandbox": f'Acquire::http::Proxy "{proxy}";\nAcquire::https::Proxy "{proxy}";\n',
        # The worker cannot break the system's packages, which pip is afraid of (PEP 668): it writes into its home.
        "/etc/pip.conf": f"[global]\nproxy = {proxy}\ncert = {BUNDLE}\ndisable-pip-version-check = true\n"
        "break-system-packages = true\n",
        "/etc/npmrc": npm,  # Debian's npm
        "/usr/local/etc/npmrc": npm,  # Node's own archive
        "/root/.cargo/config.toml": cargo,
    }
    return {
        "sshd": sshd,
        "files": [[path, 0o644, 0, text] for path, text in files.items()]
        + [[path, 0o600, WORKER_UID, text] for path, text in decoys.items()],
        "append": [
            [BUNDLE, certificate],
            ["/etc/gitconfig", f"[http]\n\tproxy = {proxy}\n\tsslCAInfo = {BUNDLE}\n"],
        ],
    }


def guest_environment(chosen: Mapping[str, str]) -> dict[str, Any]:
    """The same part of the message for a guest without a network that has variables. Raises UserInputError."""
    _check_variables(chosen)
    variables = {**locale_of(chosen), **chosen}
    return {"sshd": _set_env(variables), "files": [[PROFILE, 0o644, 0, _exports(variables)]], "append": []}


def _check_variables(variables: Mapping[str, str]) -> None:
    for name, value in variables.items():
        if not _NAME.fullmatch(name) or (value and not value.isprintable()):
            raise UserInputError(
                f"not a variable that a guest can have: {name!r}",
                resolution="a name has letters, digits and `_`; a value characters that can be printed",
            )


def _set_env(variables: Mapping[str, str]) -> str:
    return "SetEnv " + " ".join(_sshd_word(f"{name}={value}") for name, value in variables.items()) + "\n"


def _exports(variables: Mapping[str, str]) -> str:
    return "".join(f"export {name}={_shell_word(value)}\n" for name, value in variables.items())


def _sshd_word(text: str) -> str:
    """One word of an sshd_config line."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _shell_word(text: str) -> str:
    return "'" + text.replace("'", "'\\''") + "'"
