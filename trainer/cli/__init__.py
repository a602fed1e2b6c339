"""The command line: commands, dry run, doctor and the tables that they print.

It may import every other package; nothing imports it.
"""
