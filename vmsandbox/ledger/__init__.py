"""What this installation made that may still be there, and what it has promised of the host's memory and disk."""
