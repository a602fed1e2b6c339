"""Rollout: the engine interface, its engines, and the worker that the cluster places around one."""
