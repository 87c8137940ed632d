"""Whether the ledger can be used, and what is reserved in it: without it no session starts, and `gc` does only half."""

from __future__ import annotations

from vmsandbox.ledger.admission import promised_text
from vmsandbox.ledger.book import Ledger, LedgerError
from vmsandbox.session.checks import CheckResult, Examined, Status


def check_ledger(host: Examined) -> CheckResult:
    """The installation's ledger."""
    title = "ledger and reservations"
    try:
        found = promised_text(Ledger.of(host.layout)) or "nothing is reserved"
    except LedgerError as error:
        return CheckResult("ledger", title, Status.FAIL, f"{error.brief} ({error.details})", error.resolution)
    return CheckResult("ledger", title, Status.OK, found)
