"""What of the host a session has: reserved before, looked for after, and whose it is where nobody knows."""
