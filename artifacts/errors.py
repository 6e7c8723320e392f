"""Errors of the packages: one class for each kind of refusal, and one base of them all."""


class KVGaugeError(Exception):
    """Base of every error that kvgauge raises for what a user can mend.

    Each class below it is a `ValueError` or `RuntimeError` too, where it stands for one.
    """


class ArtifactError(KVGaugeError, ValueError):
    """A quantizer artifact cannot be used. Base of every refusal to read."""


class CorruptArtifactError(ArtifactError):
    """The bytes are not a whole, well-formed artifact."""


class UnsupportedVersionError(ArtifactError):
    """The file was written by another format version."""


class UnknownKindError(ArtifactError):
    """The file names a kind of quantizer that this version does not have."""


class MismatchError(ArtifactError):
    """An artifact or statistics are sound, and were made for something else."""


class UnsupportedModelError(KVGaugeError, ValueError):
    """A model caches something that no site describes."""


class UnsupportedReleaseError(KVGaugeError, ValueError):
    """A release of transformers outside the supported range is installed."""


class NonFiniteError(KVGaugeError, ValueError):
    """NaN or infinity where a finite number is needed."""
