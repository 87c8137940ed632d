"""A project's way into a guest, and what comes back of it."""
