"""The command line: parses, calls one function of the layer below, prints, and returns the exit status.

Exit statuses (the contract): a command's own; 125 vmsandbox's own failure, wrong usage included; 126 refused;
130, 143, 129 interrupted by Ctrl-C, SIGTERM, SIGHUP.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
import traceback
from types import FrameType

import typer

from vmsandbox.cli import connect, guests, host, images, looking, network, policy, returning, session, snapshots
from vmsandbox.cli.output import split_command, wants_json
from vmsandbox.errors import EXIT_OWN_FAILURE, HostError, VmsandboxError

app = typer.Typer(
    name="vmsandbox",
    help="Throwaway QEMU/KVM guests for letting an AI coding agent work on a sensitive repository.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for module in (session, guests, snapshots, returning, looking, network, connect, host):
    module.register(app)
app.add_typer(images.app, name="image", help="Build, list, verify and remove images.")
app.add_typer(policy.app, name="policy", help="Check, show, compare, import and sign policies; timers.")


# UsageError of click, which older versions of typer import and newer ones have their own copy of.
_UsageError: type[Exception] = typer.BadParameter.__bases__[0]
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)
_INTERRUPTIONS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupted(BaseException):
    """SIGTERM or SIGHUP arrived: everything is torn down on the way out."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def main(argv: list[str] | None = None) -> None:
    """Run the command line and exit with its status."""
    for number in _INTERRUPTIONS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup, or a job in the background
            signal.signal(number, _interrupt)
    arguments = list(sys.argv[1:] if argv is None else argv)
    sys.exit(_run(arguments))


def _run(argv: list[str]) -> int:
    arguments = split_command(argv)
    command = typer.main.get_command(app)
    try:
        status = command.main(arguments, prog_name="vmsandbox", standalone_mode=False)
        return status if isinstance(status, int) else 0
    except VmsandboxError as error:
        _show_error(error, arguments)
        return error.exit_code
    except typer.Exit as error:
        return error.exit_code
    except _UsageError as error:
        error.show(sys.stderr)  # type: ignore[attr-defined]
        return EXIT_OWN_FAILURE
    except (typer.Abort, KeyboardInterrupt):
        print("vmsandbox: interrupted", file=sys.stderr)
        return 130
    except Interrupted as error:
        return 128 + error.number
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # Python would complain when it flushes stdout
        return 128 + signal.SIGPIPE
    except OSError as error:
        if error.errno not in _DISK_ERRORS:
            traceback.print_exc()
            return EXIT_OWN_FAILURE
        _show_error(_disk_error(error), arguments)
        return EXIT_OWN_FAILURE
    except Exception:
        # A defect of ours; Python's own status 1 would look like the command's.
        traceback.print_exc()
        return EXIT_OWN_FAILURE


def _disk_error(error: OSError) -> HostError:
    """A disk that is full, read-only or broken may be met at any step: it is the host's fault, not a defect of ours."""
    return HostError(
        f"the host's disk could not be written: {error.strerror}",
        details=str(error.filename or error),
        resolution="`vmsandbox gc` gives space back and removes what is left; `vmsandbox doctor` shows what there is",
    )


def _interrupt(number: int, _frame: FrameType | None) -> None:
    # Once: a second Ctrl-C must not break off the cleaning up that the first one began.
    for each in _INTERRUPTIONS:
        signal.signal(each, signal.SIG_IGN)
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise Interrupted(number)


def _show_error(error: VmsandboxError, arguments: list[str]) -> None:
    if wants_json(arguments):
        print(json.dumps(error.as_json()))
        return
    red, bold, plain = ("\x1b[31m", "\x1b[1m", "\x1b[0m") if _coloured() else ("", "", "")
    print(f"{red}vmsandbox:{plain} {bold}{error.brief}{plain}", file=sys.stderr)
    for line in error.details.splitlines():
        print(f"  {line}", file=sys.stderr)
    if error.resolution:
        print(f"  → {error.resolution}", file=sys.stderr)


def _coloured() -> bool:
    return sys.stderr.isatty() and "NO_COLOR" not in os.environ
