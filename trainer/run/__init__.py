"""One run on disk and on the screen: folder, progress, trackers, checkpoints, plots.

Imports no other room of `trainer`.
"""
