"""A running session: reached, held to its limits, ended."""
