"""Attention: the packed form for training on CPUs and GPUs, latent attention, and the key/value caches of generation.

This package may import the flat layer files (`linear`, `norm`, `rope`) and `llmquest_rl.batch`, but neither `moe` nor
`recurrent`.
Models and generation may import it.
"""
