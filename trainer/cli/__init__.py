"""The command line: commands, dry run, doctor and the tables that they print.

May import every package; nothing imports it.
"""
