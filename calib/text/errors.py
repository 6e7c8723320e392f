"""Error of a text or data set."""

from artifacts.errors import KVGaugeError


class CorpusError(KVGaugeError, ValueError):
    """A text or data set cannot be used."""
