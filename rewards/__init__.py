"""Rewards: functions that judge a completion, and the grader that runs them in guarded worker processes."""
