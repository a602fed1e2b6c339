"""Mixtures of experts: routers, experts, grouped products, and replayed routing.

May import the other layers.
"""
