"""Recipes side by side: what each stores and what it costs, as a table and as JSON."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from artifacts.artifact import Artifact
from artifacts.sites import Site
from simquant import EvalResult
from simquant.evaluation.figures import error_text
from simquant.evaluation.site_errors import AttentionErrors
from simquant.usage import CONTEXT_TOKENS

LEGEND = """\
Bits per element are counted from what is stored: of the keys and the values that were encoded; their mean over the
evaluated windows, exact tokens included; and under 2K, 32K, 128K the mean with all that is stored once (scales,
codebooks, bases), spread over so many tokens. Nats are lost per token, with the standard error over windows. KL is
KL(fp || quantized) in nats, mean and 99.9th percentile. Flips: tokens whose first choice changed. Logits and output are
the squared errors of the worst layer, over the exact logits and the exact attention output. Static: bytes that are
stored once, over those of the weights. Decode: multiply-adds to decode a token, over those of the model's linear
layers. Fit and evaluate are seconds; an evaluation has a pass in full precision and one quantized. A star: scales look
at later tokens."""


@dataclass(frozen=True, kw_only=True)
class ComparedRecipe:
    """One recipe on one model and text.

    Parameters
    ----------
    name : str
        The recipe's.
    artifact : Artifact
        What was fitted.
    fit_seconds : float
        From statistics to artifact, wall time.
    errors : Mapping[int, AttentionErrors]
        By layer.
    result : EvalResult
        Bits and losses.
    """

    name: str
    artifact: Artifact
    fit_seconds: float
    errors: Mapping[int, AttentionErrors]
    result: EvalResult

    @property
    def mean_bits(self) -> float:
        """Of keys and values, exact tokens included, static bytes left out."""
        return float(self.result.bits["average"])

    def amortised_bits(self, context_tokens: int) -> float:
        """Of keys and values, which have as many channels, with static bytes."""
        # Keys and values have as many channels each, so that the plain mean is the mean over elements.
        both = self.result.bits["amortised"][str(context_tokens)]
        return float(both["key"] + both["value"]) / 2

    def worst(self, error: str) -> float:
        """Largest relative error over layers, one of `AttentionErrors.relative`."""
        return max(errors.relative()[error] for errors in self.errors.values())

    @property
    def causal(self) -> bool:
        """True where every scale comes from one token alone, or from calibration."""
        return all(quantizer.is_causal for quantizer in self.artifact.values())

    def to_json(self) -> dict[str, Any]:
        """Everything, site by site."""
        return {
            "name": self.name,
            "recipe": dict(self.artifact.manifest.recipe),
            "fit_seconds": self.fit_seconds,
            **self.result.to_json(),
            "amortised": {str(n): self.amortised_bits(n) for n in CONTEXT_TOKENS},
            "decode_share": self.result.costs.decode_share,
            "causal": self.causal,
            "worst": {error: _finite(self.worst(error)) for error in ("logits", "output")},
            "sites": {str(site): self._site_json(site) for site in self.artifact},
        }

    def _site_json(self, site: Site) -> dict[str, Any]:
        found = {name: _finite(value) for name, value in self.errors[site.layer].relative().items()}
        names = {"key": {"logits": "logits", "key_output": "output"}, "value": {"value_output": "output"}}
        own = {new: found[name] for name, new in names[site.tensor].items()}
        return {"quantizer": self.artifact[site].spec.describe(), **own, "layer_output": found["output"]}


_COLUMNS: dict[str, Callable[[ComparedRecipe], str]] = {
    "recipe": lambda row: row.name + ("" if row.causal else " *"),
    "keys": lambda row: f"{row.result.bits['key']:.2f}",
    "values": lambda row: f"{row.result.bits['value']:.2f}",
    "mean": lambda row: f"{row.mean_bits:.2f}",
    **{f"{n // 1024}K": lambda row, n=n: f"{row.amortised_bits(n):.2f}" for n in CONTEXT_TOKENS},  # type: ignore[misc]
    "nats": lambda row: f"{row.result.loss_nats:.4f} ± {error_text(row.result.loss_nats_stderr, '.4f')}",
    "KL": lambda row: f"{row.result.kl_mean:.4f} ± {error_text(row.result.kl_mean_stderr, '.4f')}",
    "KL 99.9 %": lambda row: f"{row.result.kl_p999:.3f}",
    "flips": lambda row: f"{row.result.top1_flips:.2%}",
    "logits": lambda row: f"{row.worst('logits'):.4f}",
    "output": lambda row: f"{row.worst('output'):.4f}",
    "static": lambda row: f"{row.result.costs.static_share:.1%}",
    "decode": lambda row: f"{row.result.costs.decode_share:.1%}",
    "fit": lambda row: f"{row.fit_seconds:.2f}",
    "evaluate": lambda row: f"{row.result.seconds:.1f}",
}


def in_order(rows: Sequence[ComparedRecipe]) -> list[ComparedRecipe]:
    """Fewest bits first; of equal ones the smaller loss."""
    return sorted(rows, key=lambda row: (row.mean_bits, row.result.loss_nats, row.name))


def table(rows: Sequence[ComparedRecipe]) -> str:
    """A Markdown table whose columns also line up as text."""
    cells = [list(_COLUMNS), *([cell(row) for cell in _COLUMNS.values()] for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(_COLUMNS))]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    lines = [[line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])] for line in cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in [lines[0], rule, *lines[1:]])


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
