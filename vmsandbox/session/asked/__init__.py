"""What a person asks of a session, and what the policies that hold make of it."""
