"""Where statistics come from, and which may be added up."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from artifacts.errors import MismatchError


@dataclass(frozen=True, kw_only=True)
class Origin:
    """What the statistics were taken from.

    Parameters
    ----------
    model : Mapping[str, Any]
        Fingerprint of the model.
    model_id : str or None
        Hub id, where it came from the hub.
    corpus : str
        Name of the text.
    seed : int or None
        Seed of the window sampling.
    tool_version : str
        The kvgauge that took them.
    start_token : int or None
        What every window was begun with, where it was.
    """

    model: Mapping[str, Any]
    model_id: str | None
    corpus: str
    seed: int | None
    tool_version: str
    start_token: int | None = None

    def check_same(self, other: "Origin") -> None:
        """Both are of one model, by one version.

        Raises
        ------
        MismatchError
            With what differs.
        """
        for name in ("model", "model_id", "tool_version", "start_token"):
            own, theirs = getattr(self, name), getattr(other, name)
            if own != theirs:
                advice = ". Calibrate all with --bos, or all without" if name == "start_token" else ""
                raise MismatchError(f"merge: the shards differ in {name}: {own!r:.300} and {theirs!r:.300}{advice}")

    def to_json(self) -> dict[str, Any]:
        """JSON values; a start token that there is none of is absent, so that such a file is as it always was."""
        plain = {**asdict(self), "model": dict(self.model)}
        return {name: value for name, value in plain.items() if name != "start_token" or value is not None}

    def joined(self, other: "Origin") -> "Origin":
        """The origin of both together: every text is named once, and a seed that they do not share is none."""
        if (self.corpus, self.seed) == (other.corpus, other.seed):
            return self
        names = sorted({*self.corpus.split("+"), *other.corpus.split("+")})
        return replace(self, corpus="+".join(names), seed=self.seed if self.seed == other.seed else None)
