"""Attention and its caches, on CPUs and GPUs.

May import the other layers and `llmquest_rl.batch`.
"""
