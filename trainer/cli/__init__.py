"""The commands of `llmquest-rl` and their output.

May import every room; nothing imports it.
"""
