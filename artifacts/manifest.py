"""Manifest: provenance of an artifact and specifications of its quantizers."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from importlib import metadata
from types import UnionType
from typing import Any, get_origin

from artifacts.errors import CorruptArtifactError, InvalidValueError
from artifacts.sites import Site
from artifacts.spec import QuantSpec


@dataclass(frozen=True, kw_only=True)
class CorpusRecord:
    """Record of the calibration text.

    Parameters
    ----------
    name : str
        Data set or file name, without folders.
    digest : str
        SHA-256 of the token windows.
    n_windows, n_tokens, seqlen : int
        Windows, tokens in all (padding excluded), tokens of the longest window.
    seed : int or None
        Seed of the window sampling; None for windows that were not sampled.
    start_token : int or None
        Token put before every window, if any; absent from a file otherwise.
    """

    name: str
    digest: str
    n_windows: int
    n_tokens: int
    seqlen: int
    seed: int | None = None
    start_token: int | None = None

    def to_json(self) -> dict[str, Any]:
        """Record as JSON values."""
        return {name: value for name, value in asdict(self).items() if name != "start_token" or value is not None}

    def __post_init__(self) -> None:
        _check_types(self)


@dataclass(frozen=True, kw_only=True)
class SinkChoice:
    """Grounds for a number of sink tokens that was chosen from statistics.

    Parameters
    ----------
    reason : str
        The choice in words.
    errors : list of float
        Squared error relative to the variance, mean over sites and tokens, with 0, 1, ... sink tokens; empty if there
        was nothing to compare.
    bits : list of float
        Counted bits per value with 0, 1, ... sink tokens.
    """

    reason: str
    errors: list[float] = field(default_factory=list)
    bits: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        _check_types(self)
        for name in ("errors", "bits"):
            if not all(isinstance(value, float | int) for value in getattr(self, name)):
                raise InvalidValueError(f"{name} must be numbers; got {getattr(self, name)!r:.60}")
        if len(self.errors) != len(self.bits):
            raise InvalidValueError(f"errors and bits must have one length; got {len(self.errors)}, {len(self.bits)}")


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Provenance and specifications: all of an artifact but its tensors.

    Parameters
    ----------
    specs : Mapping[Site, QuantSpec]
        Specification of the quantizer at each site.
    model : Mapping[str, Any]
        Fingerprint of the model (see `artifacts.model.fingerprint`).
    model_id : str or None
        Hub id; None for a local folder, whose path is private.
    corpus : CorpusRecord
        Calibration text.
    recipe : Mapping[str, Any]
        Recipe as it was fitted, flags included.
    sink_tokens : int
        First positions of a sequence that the cache keeps in full precision and the fit left out.
    sink_choice : SinkChoice or None
        Why so many, if they were chosen (`sink_tokens: auto` in the recipe); absent from a file otherwise.
    fit_sources : Mapping[str, str]
        By site, the statistics that were fitted: exact ones, or the name of an approximation.
    tool_version : str
        Version of kvgauge that fitted it.
    """

    specs: Mapping[Site, QuantSpec]
    model: Mapping[str, Any]
    model_id: str | None
    corpus: CorpusRecord
    recipe: Mapping[str, Any]
    sink_tokens: int = 0
    sink_choice: SinkChoice | None = None
    fit_sources: Mapping[str, str] = field(default_factory=dict)
    tool_version: str

    def __post_init__(self) -> None:
        _check_types(self)
        if type(self.sink_tokens) is not int or self.sink_tokens < 0:
            raise InvalidValueError(f"sink_tokens must be an integer from 0; got {self.sink_tokens!r}")

    def to_json(self) -> dict[str, Any]:
        """Manifest as JSON values."""
        apart = ("specs", "corpus", "sink_choice")
        plain = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in apart}
        return {
            **{name: dict(value) if isinstance(value, Mapping) else value for name, value in plain.items()},
            **({} if self.sink_choice is None else {"sink_choice": asdict(self.sink_choice)}),
            "specs": {str(site): spec.to_json() for site, spec in self.specs.items()},
            "corpus": self.corpus.to_json(),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Manifest":
        """Manifest from the output of `to_json`.

        Raises
        ------
        CorruptArtifactError
            If a field is missing, unknown or of another type.
        """
        try:
            specs = {Site.parse(site): QuantSpec.from_json(spec) for site, spec in data["specs"].items()}
            records = {"specs": specs, "corpus": CorpusRecord(**data["corpus"])}
            if "sink_choice" in data:
                records["sink_choice"] = SinkChoice(**data["sink_choice"])
            return cls(**{**data, **records})
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise CorruptArtifactError(f"manifest: {error}") from error


def tool_version() -> str:
    """Version of this distribution; `unknown` in a checkout that is not installed."""
    try:
        return metadata.version("kvgauge")
    except metadata.PackageNotFoundError:
        return "unknown"


def _check_types(record: Manifest | CorpusRecord | SinkChoice) -> None:
    # isinstance accepts a union such as `int | None`, but of `Mapping[str, Any]` only its origin, Mapping.
    for f in fields(record):
        wanted: Any = f.type if isinstance(f.type, UnionType) else get_origin(f.type) or f.type
        value = getattr(record, f.name)
        if not isinstance(value, wanted):
            raise InvalidValueError(f"{f.name} must be of type {f.type}; got {value!r:.60}")
