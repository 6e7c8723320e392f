"""Errors of a cache in use; an artifact or a cache of another model is a `MismatchError`."""

from artifacts.errors import KVGaugeError


class CacheStateError(KVGaugeError, RuntimeError):
    """Operation that a cache cannot carry out in its present state."""
