"""Provenance of statistics, and the check that shards may be merged."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from artifacts.errors import MismatchError


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Provenance of calibration statistics.

    Parameters
    ----------
    model : Mapping[str, Any]
        Fingerprint of the model.
    model_id : str or None
        Hub id; None for a local model.
    corpus : str
        Name of the text.
    seed : int or None
        Seed of the window sampling.
    tool_version : str
        Version of kvgauge that gathered them.
    start_token : int or None
        Token put before every window, if any.
    """

    model: Mapping[str, Any]
    model_id: str | None
    corpus: str
    seed: int | None
    tool_version: str
    start_token: int | None = None

    def check_same(self, other: "Origin") -> None:
        """Checks that both are of one model, version and start token.

        Raises
        ------
        MismatchError
            Names the difference.
        """
        for name in ("model", "model_id", "tool_version", "start_token"):
            own, theirs = getattr(self, name), getattr(other, name)
            if own != theirs:
                advice = ". Calibrate all with --bos, or all without" if name == "start_token" else ""
                raise MismatchError(f"merge: the shards differ in {name}: {own!r:.300} and {theirs!r:.300}{advice}")

    def to_json(self) -> dict[str, Any]:
        """Provenance as JSON values; a start token of None is absent, as in files from before there were any."""
        plain = {**asdict(self), "model": dict(self.model)}
        return {name: value for name, value in plain.items() if name != "start_token" or value is not None}

    def joined(self, other: "Origin") -> "Origin":
        """Provenance of merged statistics: names of all texts, and the seed if both have the same."""
        if (self.corpus, self.seed) == (other.corpus, other.seed):
            return self
        # Names are sets joined by "+", so that merging is associative and commutative.
        names = sorted({*self.corpus.split("+"), *other.corpus.split("+")})
        return replace(self, corpus="+".join(names), seed=self.seed if self.seed == other.seed else None)
