"""Quantizers, sites, codes, and the artifact file that stores them.

Names are imported on first use, so that tools which only read the header of a file do not wait for torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from artifacts.artifact import Artifact, load, save
    from artifacts.codes import Codes
    from artifacts.errors import (
        ArtifactError,
        CorruptArtifactError,
        MismatchError,
        NonFiniteError,
        UnknownKindError,
        UnsupportedModelError,
        UnsupportedVersionError,
    )
    from artifacts.manifest import Manifest
    from artifacts.model.attention import attention_layers, site_table
    from artifacts.quantizer import Quantizer
    from artifacts.sites import Site
    from artifacts.spec import QuantSpec

_HOME = {
    "artifact": ("Artifact", "load", "save"),
    "model.attention": ("attention_layers", "site_table"),
    "codes": ("Codes",),
    "errors": (
        "ArtifactError",
        "CorruptArtifactError",
        "MismatchError",
        "NonFiniteError",
        "UnknownKindError",
        "UnsupportedModelError",
        "UnsupportedVersionError",
    ),
    "manifest": ("Manifest",),
    "quantizer": ("Quantizer",),
    "sites": ("Site",),
    "spec": ("QuantSpec",),
}

__all__ = [
    "Artifact",
    "ArtifactError",
    "Codes",
    "CorruptArtifactError",
    "Manifest",
    "MismatchError",
    "NonFiniteError",
    "QuantSpec",
    "Quantizer",
    "Site",
    "UnknownKindError",
    "UnsupportedModelError",
    "UnsupportedVersionError",
    "attention_layers",
    "load",
    "save",
    "site_table",
]


def __getattr__(name: str) -> Any:
    for module, names in _HOME.items():
        if name in names:
            return getattr(importlib.import_module(f"artifacts.{module}"), name)
    raise AttributeError(f"module 'artifacts' has no attribute {name!r}")
