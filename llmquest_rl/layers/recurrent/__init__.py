"""Layers with a recurrent state: the gated delta rule and the short convolution before it.

This package may import the flat layer files and `llmquest_rl.batch`, but neither `attention` nor `moe`.
Models and generation may import it.
"""
