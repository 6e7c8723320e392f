"""Artifact: fitted quantizers by site with their manifest, saved to and loaded from one file."""

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from artifacts.errors import CorruptArtifactError, MismatchError
from artifacts.manifest import Manifest
from artifacts.quantizer import Quantizer
from artifacts.registry import build
from artifacts.sites import Site
from artifacts.storage import Array, Stored, naming, read, write

_LOG = logging.getLogger(__name__)

FORMAT = "kvgauge.artifact"
_SKETCH = "corpus/ngrams"


@dataclass(frozen=True, eq=False)
class Artifact(Mapping[Site, Quantizer]):
    """Quantizers by site, in the order in which a cache fills.

    Parameters
    ----------
    quantizers : Mapping[Site, Quantizer]
        Fitted quantizers.
    manifest : Manifest
        Provenance; its specifications must be those of the quantizers.
    ngrams : Tensor or None
        Sketch of the calibration text, to detect its overlap with an evaluation text.
    """

    quantizers: Mapping[Site, Quantizer]
    manifest: Manifest
    ngrams: Tensor | None = None

    def __post_init__(self) -> None:
        # Sites in the order of the cache, whatever the order of the fits.
        labelled = {site: self.quantizers[site].at(site) for site in sorted(self.quantizers)}
        object.__setattr__(self, "quantizers", labelled)
        if {site: quantizer.spec for site, quantizer in labelled.items()} != dict(self.manifest.specs):
            wrong = sorted(
                site
                for site in {*labelled, *self.manifest.specs}
                if site not in labelled or labelled[site].spec != self.manifest.specs.get(site)
            )
            named = ", ".join(map(str, wrong[:3])) + (", ..." if len(wrong) > 3 else "")
            raise CorruptArtifactError(f"artifact: the manifest must describe its quantizers; it differs at {named}")

    def __getitem__(self, site: Site) -> Quantizer:
        return self.quantizers[site]

    def __iter__(self) -> Iterator[Site]:
        return iter(self.quantizers)

    def __len__(self) -> int:
        return len(self.quantizers)

    @property
    def digest(self) -> str:
        """SHA-256 of the content, equal for both file formats."""
        return self._stored().digest

    def check_model(self, fingerprint: Mapping[str, object]) -> None:
        """Validates that the model is the calibrated one; tokenizers are compared where both are known.

        An imported artifact has no fingerprint: that is logged, and only the numbers of layers and channels can be
        compared when it runs.

        Raises
        ------
        MismatchError
            If the fingerprints differ; the message lists every difference.
        """
        wanted = self.manifest.model
        if not wanted:
            source = self.manifest.recipe.get("source", "an unknown tool")
            _LOG.warning("artifact: imported from %s, without the fingerprint of a model to compare with", source)
            return
        # A key that only one side has counts as a difference, except the tokenizer, which a caller may not have loaded.
        keys = {*wanted, *fingerprint} - ({"tokenizer"} - (set(wanted) & set(fingerprint)))
        different = [key for key in sorted(keys) if wanted.get(key) != fingerprint.get(key)]
        if different:
            rows = [f"  {key}: artifact {wanted.get(key)!r}, model {fingerprint.get(key)!r}" for key in different]
            raise MismatchError("artifact: it was made for another model:\n" + "\n".join(rows))

    def _stored(self) -> Stored:
        arrays = {
            f"{site}/{name}": _to_numpy(tensor)
            for site, quantizer in self.quantizers.items()
            for name, tensor in quantizer.tensors().items()
        }
        if self.ngrams is not None:
            arrays[_SKETCH] = _to_numpy(self.ngrams)
        return Stored(format=FORMAT, header=self.manifest.to_json(), arrays=arrays)


def save(artifact: Artifact, path: str | Path) -> None:
    """Writes an artifact as `.safetensors` or `.pkl`; equal content gives equal bytes.

    Parameters
    ----------
    artifact : Artifact
        Result of `calib.calibrate`, `calib.fit` or `load`.
    path : str or Path
        Where to; a file that is there is replaced.

    Raises
    ------
    ArtifactError
        If the path has another suffix.
    """
    write(Path(path), artifact._stored())


def load(path: str | Path) -> Artifact:
    """Reads and validates an artifact; never executes code from the file.

    Parameters
    ----------
    path : str or Path
        A file that `save` wrote.

    Returns
    -------
    Artifact
        The saved artifact, bit for bit.

    Raises
    ------
    ArtifactError
        `CorruptArtifactError`, `UnsupportedVersionError` or `UnknownKindError`.
    """
    stored = read(Path(path), FORMAT)
    with naming(Path(path)):
        try:
            return from_stored(stored)
        except RecursionError as error:
            raise CorruptArtifactError("expected a few nested quantizers; got hundreds") from error


def from_stored(stored: Stored) -> Artifact:
    """Artifact from the content of a file.

    Raises
    ------
    ArtifactError
        If manifest or arrays are missing or inconsistent.
    """
    manifest = Manifest.from_json(stored.header)
    # Copies: arrays of a pickle are views of the read-only bytes of the file.
    tensors = {name: torch.from_numpy(np.array(array)) for name, array in stored.arrays.items()}
    ngrams = tensors.pop(_SKETCH, None)
    by_site: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        place, _, own_name = name.partition("/")
        by_site.setdefault(place, {})[own_name] = tensor
    stray = set(by_site) - {str(site) for site in manifest.specs}
    if stray or not manifest.specs:
        got = f"arrays of {sorted(stray)} without one" if stray else "no specification"
        raise CorruptArtifactError(f"artifact: expected a specification for every site; got {got}")
    quantizers = {site: build(spec, by_site.get(str(site), {}), site) for site, spec in manifest.specs.items()}
    return Artifact(quantizers, manifest, ngrams)


def _to_numpy(tensor: Tensor) -> Array:
    return tensor.detach().cpu().contiguous().numpy()
