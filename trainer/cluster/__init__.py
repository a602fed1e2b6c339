"""Worker groups, placed in this process or as Ray actors, and the hardware of this machine.

May import `trainer.config`. Ray is imported in this package only.
"""
