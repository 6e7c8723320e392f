"""What can go wrong with a text."""


class CorpusError(ValueError):
    """A text or data set cannot be used."""
