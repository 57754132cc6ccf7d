"""The typed schema of a run: TOML and dotted overrides in, a frozen RunConfig out.

Entry points: `run.load_config` and `run.RunConfig`. `data` and `engine` hold those sections, `toml` reads files and refuses
an unknown key with the nearest name.
"""
