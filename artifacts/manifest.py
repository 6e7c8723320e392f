"""Where an artifact comes from and what it is for."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from importlib import metadata
from types import UnionType
from typing import Any, get_origin

from artifacts.errors import CorruptArtifactError
from artifacts.sites import Site
from artifacts.spec import QuantSpec


@dataclass(frozen=True, kw_only=True)
class CorpusRecord:
    """What was read during calibration.

    Parameters
    ----------
    name : str
        Data set or file name, without folders.
    digest : str
        SHA-256 of the token windows.
    n_windows, n_tokens, seqlen : int
        Windows, tokens in all (padding excluded), tokens of the longest window.
    seed : int or None
        Seed of the window sampling, where windows were sampled.
    start_token : int or None
        What every window was begun with, where it was; absent from a file otherwise.
    """

    name: str
    digest: str
    n_windows: int
    n_tokens: int
    seqlen: int
    seed: int | None = None
    start_token: int | None = None

    def to_json(self) -> dict[str, Any]:
        """JSON values."""
        return {name: value for name, value in asdict(self).items() if name != "start_token" or value is not None}

    def __post_init__(self) -> None:
        _check_types(self)


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Everything in an artifact that is not a tensor.

    Parameters
    ----------
    specs : Mapping[Site, QuantSpec]
        What stands at each site.
    model : Mapping[str, Any]
        Fingerprint of the model (see `artifacts.model.fingerprint`).
    model_id : str or None
        Hub id; None for a local folder, whose path is nobody else's business.
    corpus : CorpusRecord
        What it was calibrated on.
    recipe : Mapping[str, Any]
        The recipe as it was fitted, flags included.
    sink_tokens : int
        First positions of a sequence that are meant to stay exact, and took no part in the fit.
    fit_sources : Mapping[str, str]
        By site, what the fit was read from: exact statistics, or an approximation and which.
    tool_version : str
        The kvgauge that fitted it.
    """

    specs: Mapping[Site, QuantSpec]
    model: Mapping[str, Any]
    model_id: str | None
    corpus: CorpusRecord
    recipe: Mapping[str, Any]
    sink_tokens: int = 0
    fit_sources: Mapping[str, str] = field(default_factory=dict)
    tool_version: str

    def __post_init__(self) -> None:
        _check_types(self)
        if type(self.sink_tokens) is not int or self.sink_tokens < 0:
            raise ValueError(f"sink_tokens must be an integer from 0; got {self.sink_tokens!r}")

    def to_json(self) -> dict[str, Any]:
        """The manifest as JSON values."""
        plain = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("specs", "corpus")}
        return {
            **{name: dict(value) if isinstance(value, Mapping) else value for name, value in plain.items()},
            "specs": {str(site): spec.to_json() for site, spec in self.specs.items()},
            "corpus": self.corpus.to_json(),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Manifest":
        """The manifest that `to_json` wrote.

        Raises
        ------
        CorruptArtifactError
            If a field is missing, left over or of another type.
        """
        try:
            specs = {Site.parse(site): QuantSpec.from_json(spec) for site, spec in data["specs"].items()}
            return cls(**{**data, "specs": specs, "corpus": CorpusRecord(**data["corpus"])})
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise CorruptArtifactError(f"manifest: {error}") from error


def tool_version() -> str:
    """Version of this distribution; `unknown` in a checkout that is not installed."""
    try:
        return metadata.version("kvgauge")
    except metadata.PackageNotFoundError:
        return "unknown"


def _check_types(record: Manifest | CorpusRecord) -> None:
    for f in fields(record):
        wanted: Any = f.type if isinstance(f.type, UnionType) else get_origin(f.type) or f.type
        value = getattr(record, f.name)
        if not isinstance(value, wanted):
            raise ValueError(f"{f.name} must be of type {f.type}; got {value!r:.60}")
