"""The one way out of a guest: a process of its own that judges every request, dials what it checked, and says why not.

`environment` and `start` run in the session; all the rest runs in the broker's process, in an environment of its own.
"""
