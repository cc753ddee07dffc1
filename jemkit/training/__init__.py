"""Building a run, the trainer, validation, health, rollback, checkpoints of runs.

It may import config, and what config may. What a run does until its end goes here; readers of
others' weights go to pretrained/, the cost of a step to profiling/.
"""
