"""A guest's snapshots, and the guests that begin as one."""
