"""The configuration: its typed tree, how YAML becomes it, and the rules that it obeys.

May import `trainer.run.folder` and everything below `trainer`; every other room of `trainer` may import it.
"""
