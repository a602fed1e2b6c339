"""What torch's optimizers leave open: learning-rate schedules, and which parameters decay."""
