"""What a run learns from: tasks (prompts with gold answers), supervised data sets, their streams, and packing."""
