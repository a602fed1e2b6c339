"""Mixture of experts: routers and their losses, experts, grouped matrix products, and routing replay.

This package may import the flat layer files (`linear`) and `llmquest_rl.batch`, but neither `attention` nor
`recurrent`.
Models and generation may import it.
"""
