"""What is written down of a session, and who works on it: below all else of it."""
