"""A seccomp profile: read, proven, and made the kernel's program."""
