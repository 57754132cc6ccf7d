"""The native engine: the plain GPT in any layout, with torch's own optimizers."""
