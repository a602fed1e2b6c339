"""The recipes of `llmquest-rl reproduce`, which redraw curves of papers and check their claims.

May import every room but `trainer.cli`, which imports it.
"""
