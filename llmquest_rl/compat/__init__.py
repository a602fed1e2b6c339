"""Workarounds for defects of other packages.

This package imports no other file of this repository.
`data` and `rewards` may import it.
"""
