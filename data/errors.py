"""What is wrong with the data, in one line that a person can act on."""


class DataError(ValueError):
    """The user's data or data settings cannot be used; the message names the file or key and the way out."""
