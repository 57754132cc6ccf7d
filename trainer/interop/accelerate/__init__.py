"""accelerate's config files, its launcher and its Accelerator.

Entry points: `config.convert`, `prepare.prepare`.
"""
