"""Layers with a recurrent state: the gated delta rule and short convolutions.

May import the other layers.
"""
