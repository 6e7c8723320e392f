"""What can go wrong with a text."""

from artifacts.errors import KVGaugeError


class CorpusError(KVGaugeError, ValueError):
    """A text or data set cannot be used."""
