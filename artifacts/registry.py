"""Registry of quantizers, a closed table: a file can name these kinds only."""

import difflib
from collections.abc import Callable, Mapping

from torch import Tensor

from artifacts.errors import ArtifactError, CorruptArtifactError, InvalidValueError, UnknownKindError
from artifacts.quantizer import Quantizer
from artifacts.quantizers.affine import Affine
from artifacts.quantizers.block_float import BlockFloat
from artifacts.quantizers.centred import Centred
from artifacts.quantizers.codebook import Codebook, DynamicCodebook
from artifacts.quantizers.dynamic_affine import DynamicAffine
from artifacts.quantizers.entropy_coded import EntropyCoded
from artifacts.quantizers.exact_sinks import ExactSinks
from artifacts.quantizers.float8 import DynamicFloat8, Float8
from artifacts.quantizers.hadamard import Hadamard
from artifacts.quantizers.identity import Identity
from artifacts.quantizers.mixed_codebook import MixedCodebook
from artifacts.quantizers.normalised import Normalised
from artifacts.quantizers.predicted import Predicted
from artifacts.quantizers.rotated import Rotated
from artifacts.quantizers.signed_affine import SignedAffine
from artifacts.quantizers.sparse import CompactSparse, PercentileSparse, RankSparse, ThresholdSparse
from artifacts.quantizers.streaming import Streaming
from artifacts.sites import Site
from artifacts.spec import QuantSpec

KINDS: dict[str, type[Quantizer]] = {
    kind.kind: kind
    for kind in (
        Identity,
        Affine,
        DynamicAffine,
        SignedAffine,
        Codebook,
        DynamicCodebook,
        MixedCodebook,
        EntropyCoded,
        Float8,
        DynamicFloat8,
        BlockFloat,
        Streaming,
        ThresholdSparse,
        PercentileSparse,
        RankSparse,
        CompactSparse,
        Rotated,
        Hadamard,
        Centred,
        Normalised,
        Predicted,
        ExactSinks,
    )
}


def build(spec: QuantSpec, tensors: Mapping[str, Tensor], site: Site) -> Quantizer:
    """Quantizer from its specification and tensors.

    Raises
    ------
    UnknownKindError
        If no quantizer has the name.
    CorruptArtifactError
        If options or tensors are missing, unknown or out of range.
    """
    if spec.kind not in KINDS:
        near = difflib.get_close_matches(spec.kind, KINDS, n=1)
        raise UnknownKindError(
            f"{site}: unknown kind of quantizer {spec.kind!r}; this version has {', '.join(KINDS)}."
            + (f" Nearest: {near[0]}." if near else "")
        )
    # Tensors of a wrapped quantizer are named inner.NAME, at any depth inner.inner.NAME: strip one level per call.
    own = {name: tensor for name, tensor in tensors.items() if "." not in name}
    inner = {name.removeprefix("inner."): tensor for name, tensor in tensors.items() if "." in name}
    try:
        kind: Callable[..., Quantizer] = KINDS[spec.kind]
        wrapped = {} if spec.inner is None else {"inner": build(spec.inner, inner, site)}
        if spec.inner is None and inner:
            raise InvalidValueError(f"{spec.kind}: it has no wrapped quantizer; got tensors {sorted(inner)} of one")
        return kind(**spec.options, **own, **wrapped, site=site)
    except ArtifactError:
        raise
    except (TypeError, ValueError, AttributeError) as error:
        raise CorruptArtifactError(f"{site}: {error}") from error
