"""Worker groups, placed in this process or as Ray actors, and the hardware of this machine.

It may import `trainer.config`. Ray is imported in this package only.
`trainer.learner`, `trainer.sources` and everything above them may import it.
"""
