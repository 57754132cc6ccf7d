"""Slurm: `slurm` submits, `site` is the inside of a job, `commands` and `text` speak with Slurm's clients."""
