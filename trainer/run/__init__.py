"""One run on disk and on the screen: its folder, progress, trackers, checkpoints and plots.

Imports no other room of `trainer`.
"""
