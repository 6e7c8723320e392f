"""What can go wrong with a cache in use; that an artifact or a cache is of another model is a `MismatchError`."""


class CacheStateError(RuntimeError):
    """A cache cannot do what was asked of it in the state that it is in."""
