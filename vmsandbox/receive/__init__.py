"""What comes back from a guest, until it lies in quarantine on the host: protocol, receiving process, store."""
