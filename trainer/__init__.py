"""One run: its config, model, engines, steps, checkpoints and records.

Entry points: `train.loop.fit` is a whole run on one page; `train.rank` is one rank's process; `config.run.load_config` reads a
run's TOML.
"""
