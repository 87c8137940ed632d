"""Policies that hold together: whose each value is, who signed it, and what a project cannot grant itself."""
