"""Makes a policy of the hardening that people keep in compose files and devcontainer files.

Without it they would write it again by hand, and forget half of it. What has no counterpart is listed with the reason:
nothing of a file is dropped in silence.
"""
