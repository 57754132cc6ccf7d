"""The GPT: plain torch modules that know nothing of layouts, engines or files.

Entry points: `gpt.GPT` and `config.ModelConfig`.
"""
