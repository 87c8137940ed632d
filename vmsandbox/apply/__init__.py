"""Writes accepted changes into a project: all of them or none, whatever happens meanwhile."""
