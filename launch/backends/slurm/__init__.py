"""Slurm.

`slurm` submits and holds the batch script, `site` is the inside of a job, `commands` and `parse` call Slurm's clients and read
their output.
"""
