"""Files and displays of one run: its folder, checkpoints, metrics, progress bar and plots.

Imports no other package of `trainer`.
"""
