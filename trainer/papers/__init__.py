"""Recipes that redraw curves of papers and check their claims: `llmquest-rl reproduce`.

It may import the other packages of `trainer` except `trainer.cli`, which alone imports it.
"""
