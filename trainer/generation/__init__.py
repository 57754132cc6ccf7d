"""Text from a trained model.

Entry points: `generate` makes it, token by token; `prompt` is what it begins with.
"""
