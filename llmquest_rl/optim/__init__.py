"""Additions to torch's optimizers: learning-rate schedules, and the choice of parameters that decay.

This package imports torch alone; the learner imports it.
"""
