"""What stays of a session: its record, and the project as it was before."""
