"""Where workers run: in this process or as Ray actors, and what the machine offers.

May import `trainer.config.schema`. Ray is imported here only.
"""
