"""The policy that a session really has: the organisation's file, the person's and the project's, all at once.

Without one place for it, one command would ask the organisation and another would forget to.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from pathlib import Path

from vmsandbox.errors import HostError, RefusedError
from vmsandbox.paths import config_folder
from vmsandbox.policy.layer import Layer
from vmsandbox.policy.values import Policy
from vmsandbox.process import Programs

# No variable and no option leads elsewhere: who starts a session could choose another organisation.
ORGANISATION = Path("/etc/vmsandbox/policy.yaml")


@dataclass(frozen=True)
class Effective:
    """What holds, and what it was made of. layers: the widest first. own: the project's, or the one that was named."""

    policy: Policy
    layers: tuple[Layer, ...] = ()
    own: Layer | None = None


def effective_policy(
    path: Path | None,
    *,
    organisation: Path = ORGANISATION,
    user: Path | None = None,
    programs: Programs | None = None,
    given: Policy | None = None,
) -> Effective:
    """Read all files that hold and merge them.

    Args:
        path: the project's policy or the one that was named; None: there is none.
        organisation: the organisation's file, if there is one.
        user: the person's; None: `policy.yaml` beside their recipes.
        given: in the place of the file, a policy that a program made.

    Raises:
        UserInputError: one of the files is not a policy.
        RefusedError: one is not signed though the organisation demands it, or they have nothing in common.
        HostError: a file that holds cannot be looked for, or anybody could have written the organisation's.
    """
    if user is None:
        user = config_folder() / "policy.yaml"
    widest = _exists(organisation)
    others = [one for one in (user if user != organisation and _exists(user) else None, path) if one is not None]
    if not widest and not others:
        return Effective(given or Policy())  # nothing to import for
    from vmsandbox.policy.load import load_layer
    from vmsandbox.policy.merging.merge import merge

    layers = []
    if widest:
        _refuse_anybodys(organisation)
        layers.append(load_layer(organisation, organisation=True))
    layers += [load_layer(one) for one in others]
    if widest and (demanded := layers[0].signed) is not None:
        from vmsandbox.policy.merging.signing import check_signatures

        _refuse_anybodys(demanded.allowed_signers)
        for layer in layers[1:]:
            check_signatures(layer, demanded, programs or Programs())
        if given is not None and given != Policy():
            raise RefusedError(
                "this host demands signed policies, and one that a program made has no file that could be signed",
                resolution="name the policy's file instead",
            )
    if given is not None:
        from vmsandbox.policy.layer import layer_of

        layers.append(layer_of(given))
    return Effective(merge(layers), tuple(layers), layers[-1] if path is not None else None)


def _exists(path: Path) -> bool:
    try:
        path.lstat()  # a dangling link counts: reading it then says what is wrong
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise HostError(f"whether there is a policy that holds cannot be told: {path}", details=str(error)) from error
    return True


def _refuse_anybodys(path: Path) -> None:
    try:
        found = path.stat()
    except OSError as error:
        raise HostError(f"a file of the organisation's policy cannot be read: {path}", details=str(error)) from error
    if found.st_uid not in (0, os.getuid()) or stat.S_IMODE(found.st_mode) & 0o022:
        raise HostError(
            f"others than root may write a file of the organisation's policy: {path}",
            resolution=f"chown root {path}; chmod go-w {path}",
        )
