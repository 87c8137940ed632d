"""A guest's way out: held on the host, by its policy, and written down."""
