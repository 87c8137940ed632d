#!/bin/sh
# What `make session` runs inside the guest: looks around, uses this repository's code, and changes the copy.
set -eu
say() { printf '\n-- %s\n' "$*"; }

say "who and where: a user without rights, in a copy of the repository"
echo "$(id -un)@$(hostname), $(. /etc/os-release && echo "$PRETTY_NAME"), Linux $(uname -r)"
pwd

say "every network device there is"
ip -brief link

say "the journal of this repository notices a changed record"
PYTHONDONTWRITEBYTECODE=1 python3 - << 'PYTHON'
import pathlib
from vmsandbox.errors import JournalError
from vmsandbox.journal.chain import Journal
from vmsandbox.journal.events import CommandStarted

path = pathlib.Path("/tmp/events.jsonl")
journal = Journal(path)
for word in ("ls", "make", "git"):
    journal.append(CommandStarted([word], terminal=False))
path.write_text(path.read_text().replace("make", "fake"))
try:
    journal.read()
    raise SystemExit("it did not notice")
except JournalError as error:
    print("noticed:", error)
PYTHON

say "changes that an agent might make (only the guest's copy has them)"
echo "one line more" >> README.md
echo "new" > NOTES.txt
rm LICENSE
echo "README.md edited, NOTES.txt written, LICENSE deleted"
