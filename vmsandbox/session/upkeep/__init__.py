"""What a running guest is given and kept at: its identity, its clock, its memory, its health."""
