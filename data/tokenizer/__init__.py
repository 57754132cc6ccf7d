"""Text to token ids and back, and the tokens that begin and end a document.

Entry points: `tokenizer.load_tokenizer`.
"""
