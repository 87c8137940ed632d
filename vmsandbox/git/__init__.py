"""Git on the host with everything off that a repository could make it run; commits in and out of guests, backups."""
