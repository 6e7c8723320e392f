"""Every refusal of this package has a class of its own, so that callers and tests can name it."""


class ArtifactError(ValueError):
    """A quantizer artifact cannot be used. Base of every refusal to read."""


class CorruptArtifactError(ArtifactError):
    """The bytes are not a whole, well-formed artifact."""


class UnsupportedVersionError(ArtifactError):
    """The file was written by another format version."""


class UnknownKindError(ArtifactError):
    """The file names a kind of quantizer that this version does not have."""


class MismatchError(ArtifactError):
    """The artifact is sound and was made for something else."""


class UnsupportedModelError(ValueError):
    """A model caches something that no site describes."""


class UnsupportedReleaseError(ValueError):
    """A release of transformers outside the supported range is installed."""


class NonFiniteError(ValueError):
    """NaN or infinity where a finite number is needed."""
