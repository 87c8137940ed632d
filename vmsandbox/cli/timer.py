"""policy timer: the session of a project, repeated when its policy says."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from vmsandbox.cli.options import EmulationOption, JsonOption, PolicyOption, ProjectArgument
from vmsandbox.cli.output import guest_command, print_json
from vmsandbox.errors import UserInputError
from vmsandbox.process import Programs
from vmsandbox.spec import Accept


def timer(
    path: ProjectArgument = Path(),
    policy: PolicyOption = None,
    accept: Annotated[Accept, typer.Option("--accept", help="What comes back without a person.")] = Accept.NONE,
    allow_emulation: EmulationOption = False,
    install: Annotated[bool, typer.Option("--install", help="Write the units, and start the timer.")] = False,
    remove: Annotated[bool, typer.Option("--remove", help="Take the project's timer away.")] = False,
    json: JsonOption = False,
) -> int:
    """Show (or install) systemd's timer that runs COMMAND in a fresh guest, when session.schedule says.

    vmsandbox policy timer [PATH] [OPTIONS] -- COMMAND …
    """
    from vmsandbox.policy.packaged import packaged_policy
    from vmsandbox.render.timer import render_units
    from vmsandbox.session.asked.holding import effective_for
    from vmsandbox.session.timers import check_schedule, install_timer, remove_timer, timer_for

    project, programs = Path(os.path.realpath(path)), Programs()  # one name, however it was written
    if install and remove:
        raise UserInputError("--install and --remove exclude each other")
    if remove:
        files = remove_timer(project, programs)
        _tell("removed", {str(file): "" for file in files}, json)
        return 0
    named = policy
    if policy is not None and packaged_policy(policy) == policy:  # a file, which the timer finds from elsewhere too
        named = policy.absolute()
    schedule = effective_for(project, named).policy.session.schedule
    plan = timer_for(
        project, schedule, guest_command() or (), policy=str(named) if named else None, accept=accept,
        allow_emulation=allow_emulation,
    )  # fmt: skip
    if install:
        texts = render_units(plan)
        _tell("installed", {str(file): texts[file.name] for file in install_timer(plan, programs)}, json)
        return 0
    check_schedule(plan.schedule, programs)
    _tell("printed", render_units(plan), json)
    return 0


def _tell(done: str, units: dict[str, str], json: bool) -> None:
    if json:
        print_json({"done": done, "units": units})
    elif done == "printed":
        print("\n".join(f"# {name}\n{text}" for name, text in units.items()), end="")
    else:
        print("\n".join(f"{done} {name}" for name in units) or "there is no timer of this project")
