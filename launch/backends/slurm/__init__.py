"""Slurm: `slurm` submits, `site` runs inside a job, `commands` and `parse` call Slurm's clients and read their output."""
