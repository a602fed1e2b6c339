"""The configuration of a run: its typed tree, the loading of YAML files, and the rules between options.

It may import `trainer.run.folder` and everything below `trainer`; every package of `trainer` but `run` may import it.
"""
