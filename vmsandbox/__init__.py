"""vmsandbox: throwaway QEMU/KVM guests for letting an AI coding agent work on a sensitive repository."""

__version__ = "0.1.0"
