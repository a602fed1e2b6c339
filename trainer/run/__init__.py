"""Files and displays of one run: its folder, checkpoints, metrics, progress bar and plots.

It imports no other package of `trainer`.
Every other package of `trainer` may import it.
"""
