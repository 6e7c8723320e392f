"""Error classes of the packages, with one common base."""


class KVGaugeError(Exception):
    """Base of the errors that a user can resolve.

    Most subclasses are also a `ValueError` or `RuntimeError`, for callers that expect these.
    """


class InvalidValueError(KVGaugeError, ValueError):
    """An argument or a setting has a value that cannot be."""


class ArtifactError(KVGaugeError, ValueError):
    """A file of kvgauge or another tool cannot be used. Base of all errors of reading."""


class CorruptArtifactError(ArtifactError):
    """A file is damaged, incomplete or of another format."""


class UnsupportedVersionError(ArtifactError):
    """A file has another format version."""


class UnknownKindError(ArtifactError):
    """A file names a kind of quantizer that this version does not have."""


class MismatchError(ArtifactError):
    """A valid artifact or valid statistics belong to another model, site or setting."""


class UnsupportedModelError(KVGaugeError, ValueError):
    """A model has attention layers or a cache that are not supported."""


class UnsupportedReleaseError(KVGaugeError, ValueError):
    """A release of transformers outside the supported range is installed."""


class NonFiniteError(KVGaugeError, ValueError):
    """Values are NaN or infinite."""


class UnsupportedLayer(KVGaugeError):
    """A layer is not supported; the message is the reason."""


class NothingCached(UnsupportedLayer):
    """A layer keeps no keys and values of its own, so that there is nothing to quantize; the message is the reason."""
