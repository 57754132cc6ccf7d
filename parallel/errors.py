"""What is wrong with a layout, in one line that a person can act on."""


class LayoutError(ValueError):
    """A layout that cannot be; the message gives the reason and the nearest ones that can."""
