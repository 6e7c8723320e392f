"""What can go wrong with a cache in use; that an artifact or a cache is of another model is a `MismatchError`."""

from artifacts.errors import KVGaugeError


class CacheStateError(KVGaugeError, RuntimeError):
    """A cache cannot do what was asked of it in the state that it is in."""
