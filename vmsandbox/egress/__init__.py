"""What a guest may reach, as pure rules: hosts, requests, secrets, packages. Nothing here opens a connection."""
