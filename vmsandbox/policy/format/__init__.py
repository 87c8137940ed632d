"""The format of a policy file: its shape, its words, where it is wrong, and how it is written."""
