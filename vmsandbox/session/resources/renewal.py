"""Begins another ledger where the old one cannot be read, with what the folders of live sessions say."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from vmsandbox.errors import UserInputError, VmsandboxError
from vmsandbox.ledger.admission import QEMU
from vmsandbox.ledger.book import Kind, Ledger, LedgerError, NewerLedgerError, Thing
from vmsandbox.ledger.processes import Process
from vmsandbox.paths import Layout
from vmsandbox.session.state.folder import live_sessions


def renew_ledger(layout: Layout) -> Path:
    """Set a damaged ledger aside and write a new one; returns where the old one is kept.

    Raises:
        UserInputError: the ledger is good. NewerLedgerError: it is a newer program's, which can read it.
        LedgerError: the new one cannot be written either.
    """
    ledger = Ledger.of(layout)
    try:
        ledger.rows()
    except NewerLedgerError:
        raise
    except LedgerError:
        pass
    else:
        advice = "omit --new-ledger"
        raise UserInputError("the ledger is not damaged", details=str(ledger.path), resolution=advice)
    try:
        aside = ledger.set_aside()
    except OSError as error:
        raise LedgerError("the damaged ledger cannot be set aside", details=str(error)) from error
    for folder in live_sessions(layout):
        with suppress(VmsandboxError):
            info = folder.info()
            things: list[Thing] = [
                (Kind.FOLDER, info.name),
                (Kind.DOMAIN, info.uuid),
                (Kind.SOCKETS, folder.sockets(info).name),
                (Kind.SOCKETS, folder.net.name),
            ]
            with suppress(OSError, ValueError):
                qemu = Process.of(folder.qemu_pid(info))
                things.append((Kind.PROCESS, f"{qemu} {QEMU}"))
            ledger.plan(info.id, *things)
    ledger.rows()  # made, also where there is no session
    return aside
