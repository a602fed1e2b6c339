"""The trainer: configuration, cluster, learner, sources, the loop, checkpoints, tracking, command line."""
