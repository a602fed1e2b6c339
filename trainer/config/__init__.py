"""The configuration: its typed tree, reading it from YAML, and its rules.

May import `trainer.run` (names of run folders) and everything below `trainer`; every other room may import it.
"""
