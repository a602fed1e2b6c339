"""Work-arounds for packages of others.

Imports nothing of ours.
"""
