"""What an evaluation found, with units and errors."""

import math
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class EvalResult:
    """Figures of one evaluation, full precision against quantized on the same tokens.

    Parameters
    ----------
    fp_perplexity, perplexity : float
        Of the model as it is, and with its cache quantized.
    loss_nats, loss_nats_stderr : float
        Mean rise of a target's negative log probability; its standard error, paired and clustered by window (nan for
        a single window).
    kl_mean, kl_p999 : float
        KL(fp || quantized) in nats per target: mean and 99.9th percentile.
    top1_agreement : float
        Share of targets where both models rank the same token first.
    bits : dict
        Counted bits per element of keys and values, static bytes, and both together at some context lengths.
    quantized_fraction : float
        Share of tokens, over all sites, that were quantized.
    protocol : str
        What was quantized and how perplexity is normalised, in one line.
    n_targets, n_windows : int
        Scored tokens and windows.
    seconds : float
        Wall time.
    """

    fp_perplexity: float
    perplexity: float
    loss_nats: float
    loss_nats_stderr: float
    kl_mean: float
    kl_p999: float
    top1_agreement: float
    bits: dict[str, Any]
    quantized_fraction: float
    protocol: str
    n_targets: int
    n_windows: int
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """JSON values; what is no finite number becomes null and is named under `non_finite`."""
        plain = {
            "fp": {"perplexity": self.fp_perplexity},
            "quantized": {"perplexity": self.perplexity},
            "loss_nats": self.loss_nats,
            "loss_nats_stderr": self.loss_nats_stderr,
            "kl_mean": self.kl_mean,
            "kl_p999": self.kl_p999,
            "top1_agreement": self.top1_agreement,
            "bits": self.bits,
            "quantized_fraction": self.quantized_fraction,
            "protocol": self.protocol,
            "n_targets": self.n_targets,
            "n_windows": self.n_windows,
            "seconds": self.seconds,
        }
        non_finite: dict[str, str] = {}
        cleaned: dict[str, Any] = _finite(plain, "", non_finite)
        return {**cleaned, "non_finite": non_finite} if non_finite else cleaned

    def table(self) -> str:
        """A table for people."""
        amortised = self.bits["amortised"]
        rows = [
            ("perplexity, full precision", f"{self.fp_perplexity:.4f}"),
            ("perplexity, quantized", f"{self.perplexity:.4f}"),
            ("loss", f"{self.loss_nats:+.5f} nats per token, standard error {self.loss_nats_stderr:.5f}"),
            ("KL(fp || quantized)", f"{self.kl_mean:.5f} mean, {self.kl_p999:.4f} at the 99.9th percentile"),
            ("top-1 agreement", f"{self.top1_agreement:.2%}"),
            ("bits per element, stored", f"keys {self.bits['key']:.3f}, values {self.bits['value']:.3f}"),
            *(
                (f"with static bytes, {int(n) // 1024}K tokens", f"keys {b['key']:.3f}, values {b['value']:.3f}")
                for n, b in amortised.items()
            ),
            ("quantized_fraction", f"{self.quantized_fraction:.6g}"),
            ("protocol", self.protocol),
            ("seconds", f"{self.seconds:.1f}"),
        ]
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name.rjust(width)}: {value}" for name, value in rows)


def _finite(value: Any, name: str, non_finite: dict[str, str]) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item, f"{name}.{key}" if name else key, non_finite) for key, item in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        non_finite[name] = str(value)
        return None
    return value
