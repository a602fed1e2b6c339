"""The command line and what its commands print.

May import every room; nothing imports it.
"""
