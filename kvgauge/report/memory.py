"""What a cache takes at some context lengths, from what was counted."""

from collections.abc import Mapping
from typing import Any

from artifacts.quantizer import Quantizer
from artifacts.sites import Site

_EXACT_BYTES = 2


def memory(result: Mapping[str, Any], quantizers: Mapping[Site, Quantizer]) -> list[dict[str, Any]]:
    """Bytes of one sequence by context length: codes, exact tokens and static bytes, against 16 bits per element.

    Parameters
    ----------
    result : mapping
        `EvalResult.to_json`.
    quantizers : mapping from Site to Quantizer
        Those that were evaluated.
    """
    channels = {
        tensor: sum(quantizer.channels for site, quantizer in quantizers.items() if site.tensor == tensor)
        for tensor in ("key", "value")
    }
    return [_row(int(n), bits, channels, result["bits"]) for n, bits in result["bits"]["amortised"].items()]


def _row(n_tokens: int, bits: Mapping[str, float], channels: Mapping[str, int], stored: Mapping[str, Any]) -> Any:
    key, value = (round(bits[tensor] * n_tokens * channels[tensor] / 8) for tensor in ("key", "value"))
    exact = _EXACT_BYTES * n_tokens * sum(channels.values())
    return {
        "context_tokens": n_tokens,
        "key_bytes": key,
        "value_bytes": value,
        "static_bytes": sum(stored["static_bytes"].values()),
        "total_bytes": key + value,
        "exact_16_bit_bytes": exact,
        "times_smaller": exact / (key + value),
    }
