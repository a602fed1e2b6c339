"""Policy-gradient algorithms as rows of cells: a cell names a small function, and `presets.py` is the table of rows.

`resolve("grpo", {"beta": 0.0})` gives a row with one setting replaced. This package holds the functions of every cell
(`cells.py` lists them), and the way from graded groups to weighted tokens (`sequence_groups.py`). It may import types,
batches, metrics, options, `loader` and `deferred` of the library, and is imported by objectives and the trainer.
"""
