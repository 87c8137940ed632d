"""From what was asked for to a guest that has its identity and answers."""
