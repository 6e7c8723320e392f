"""Result of an evaluation, with units and standard errors."""

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch

from artifacts.errors import InvalidValueError
from simquant.evaluation.costs import Costs
from simquant.evaluation.figures import error_text, mean_of_sums

_NOT_IN_JSON = ("cluster_nats", "cluster_targets")


@dataclass(frozen=True, kw_only=True)
class EvalResult:
    """Figures of one evaluation, full precision against quantized on the same tokens.

    A `_stderr` is the standard error of the figure of that name, clustered by window (nan for a single window); strided
    windows form one cluster until they have advanced by a window's length. Errors of functions of a mean are to first
    order.

    Parameters
    ----------
    fp_perplexity, perplexity : float
        Perplexity in full precision, and with the cache quantized.
    loss_nats : float
        Mean increase of a target's negative log-likelihood, paired; negative if the quantized model does better.
    kl_mean, kl_p99, kl_p999 : float
        KL(fp || quantized) in nats per target: mean, 99th and 99.9th percentile.
    top1_agreement, top1_flips : float
        Share of targets for which both models rank the same token first, and for which they do not.
    delta_p_mean, delta_p_rms : float
        Change of the target's probability, quantized less full precision, from -1 to 1: mean, and root mean square.
        llama.cpp prints both as per cent.
    bits : dict
        Counted bits per element of keys and values, static bytes, and both together at some context lengths.
    costs : Costs
        Bits of a token, static bytes, and the arithmetic of decoding, over all sites.
    quantized_fraction : float
        Share of tokens, over all sites, that were quantized.
    protocol : str
        Line with the protocol, the policy, the scored targets and the normalisation of perplexity.
    n_targets, n_windows : int
        Numbers of scored tokens and of windows.
    seconds : float
        Wall time.
    cluster_nats : tuple of float
        Sum of the loss over the targets of each cluster, for comparisons of results; not in the JSON.
    cluster_targets : tuple of int
        Number of targets of each cluster.
    warnings : tuple of str
        Reasons to distrust the figures.
    """

    fp_perplexity: float
    fp_perplexity_stderr: float
    perplexity: float
    perplexity_stderr: float
    loss_nats: float
    loss_nats_stderr: float
    kl_mean: float
    kl_mean_stderr: float
    kl_p99: float
    kl_p999: float
    top1_agreement: float
    top1_flips: float
    top1_flips_stderr: float
    delta_p_mean: float
    delta_p_mean_stderr: float
    delta_p_rms: float
    delta_p_rms_stderr: float
    bits: dict[str, Any]
    costs: Costs
    quantized_fraction: float
    protocol: str
    n_targets: int
    n_windows: int
    seconds: float
    cluster_nats: tuple[float, ...] = ()
    cluster_targets: tuple[int, ...] = ()
    warnings: tuple[str, ...] = ()

    def loss_beyond(self, other: "EvalResult") -> tuple[float, float]:
        """Loss in nats per target beyond that of `other`, and the paired standard error of the difference.

        Raises
        ------
        ValueError
            If the two results are not of the same windows.
        """
        # Paired by window: the difficulty of a window is in both losses and cancels in the difference, so that its
        # standard error is smaller than that of either loss.
        same_text = math.isclose(self.fp_perplexity, other.fp_perplexity, rel_tol=1e-3)  # batch size changes rounding
        if not self.cluster_targets or self.cluster_targets != other.cluster_targets or not same_text:
            raise InvalidValueError(
                "results: expected two evaluations of the same windows; got "
                + " and ".join(
                    f"{r.n_targets} targets in {r.n_windows} windows of full-precision perplexity {r.fp_perplexity:.4f}"
                    for r in (self, other)
                )
                + ". Evaluate both with the same text, seqlen and number of windows"
            )
        mine, others = (torch.tensor(r.cluster_nats, dtype=torch.float64) for r in (self, other))
        return mean_of_sums(mine - others, torch.tensor(self.cluster_targets))

    def to_json(self) -> dict[str, Any]:
        """JSON values; non-finite figures become null, and are listed under `non_finite` unless standard errors."""
        plain = {name: value for name, value in asdict(self).items() if name not in _NOT_IN_JSON}
        sides = {
            side: {name: plain.pop(prefix + name) for name in ("perplexity", "perplexity_stderr")}
            for side, prefix in (("fp", "fp_"), ("quantized", ""))
        }
        # JSON has no NaN or infinity. Readers must be able to tell a missing figure from an infinite one; errors of a
        # single window are undefined by design and not listed.
        non_finite: dict[str, str] = {}
        plain["warnings"] = list(self.warnings)
        cleaned: dict[str, Any] = _finite({**sides, **plain}, "", non_finite)
        return {**cleaned, "non_finite": non_finite} if non_finite else cleaned

    def table(self) -> str:
        """Table as text."""
        rows = [*self._losses(), *self._storage(), ("protocol", self.protocol), ("seconds", f"{self.seconds:.1f}")]
        rows += [("warning", warning) for warning in self.warnings]
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name.rjust(width)}: {value}" for name, value in rows)

    def _losses(self) -> list[tuple[str, str]]:
        return [
            ("perplexity, full precision", f"{self.fp_perplexity:.4f} ± {self._error('fp_perplexity_stderr', '.4f')}"),
            ("perplexity, quantized", f"{self.perplexity:.4f} ± {self._error('perplexity_stderr', '.4f')}"),
            ("loss", f"{self.loss_nats:+.5f} nats per token, standard error {self._error('loss_nats_stderr', '.5f')}"),
            (
                "KL(fp || quantized)",
                f"{self.kl_mean:.5f} ± {self._error('kl_mean_stderr', '.5f')} mean, {self.kl_p99:.4f} at the 99th and "
                f"{self.kl_p999:.4f} at the 99.9th percentile",
            ),
            ("first choice changed", f"{self.top1_flips:.2%} ± {self._error('top1_flips_stderr', '.2%')}"),
            (
                "change of target's probability",
                f"{self.delta_p_rms:.3%} ± {self._error('delta_p_rms_stderr', '.3%')} root mean square, "
                f"{self.delta_p_mean:+.3%} ± {self._error('delta_p_mean_stderr', '.3%')} mean",
            ),
        ]

    def _error(self, name: str, form: str) -> str:
        one = " (one window)" if len(self.cluster_targets) == 1 else ""
        stderr: float = getattr(self, name)
        return error_text(stderr, form) + ("" if math.isfinite(stderr) else one)

    def _storage(self) -> list[tuple[str, str]]:
        both = {"bits per element, stored": self.bits} | {
            f"with static bytes, {int(n) // 1024}K tokens": bits for n, bits in self.bits["amortised"].items()
        }
        return [
            *((name, f"keys {bits['key']:.3f}, values {bits['value']:.3f}") for name, bits in both.items()),
            ("cost of a token", self.costs.describe()),
            ("quantized_fraction", f"{self.quantized_fraction:.6g}"),
        ]


def _finite(value: Any, name: str, non_finite: dict[str, str]) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item, f"{name}.{key}" if name else key, non_finite) for key, item in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        if not name.endswith("_stderr"):
            non_finite[name] = str(value)
        return None
    return value
