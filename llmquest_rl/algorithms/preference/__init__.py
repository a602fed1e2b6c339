"""Preference optimisation as rows of cells: DPO and its relatives, as `algorithms` has GRPO and its relatives.

A row names a `margin`, which scores an answer (`margins.py`), and a `link`, which turns the scores of a good and of a
bad answer into a loss (`links.py`). `method.py` holds the settings and `presets.py` the table of rows. This package may
import `variant` and `unused_settings` of `algorithms`, `options`, `loader` and `deferred`; objectives and the trainer
may import it.
"""
