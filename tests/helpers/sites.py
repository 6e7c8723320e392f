"""One quantizer of 16 channels for every site of a small model."""

from collections.abc import Callable

from artifacts.quantizer import Quantizer
from artifacts.quantizers.dynamic_affine import DynamicAffine
from artifacts.quantizers.identity import Identity
from artifacts.sites import Site, Stage

CHANNELS = 16


Quantizers = dict[Site, Quantizer]


def per_token(bits: int = 4) -> Quantizer:
    return DynamicAffine(channels=CHANNELS, bits=bits)


def per_channel(bits: int = 4) -> Quantizer:
    return DynamicAffine(channels=CHANNELS, bits=bits, per="channel")


def identity() -> Quantizer:
    return Identity(channels=CHANNELS)


def everywhere(make: Callable[[], Quantizer], stage: Stage = "pre_rope") -> Quantizers:
    """The same quantizer for keys and values of both layers."""
    sites = [site for layer in range(2) for site in (Site(layer, "key", stage), Site(layer, "value"))]
    return {site: make() for site in sites}


def per_group(bits: int = 4) -> Quantizer:
    return DynamicAffine(channels=CHANNELS, bits=bits, per="channel", group_size=4)
