"""Recipes from the options of "Real-Time Prefill KV Cache Compression"."""

import difflib
import re
from typing import Any

from pydantic import ValidationError

from artifacts.errors import InvalidValueError
from calib.estimators.streaming import StreamingEstimator
from calib.statistics.site_statistics import FIRST_POSITIONS

_FIELDS = {
    "chunk_size": (("key", "value"), "chunk_tokens"),
    "ema_decay": (("key", "value"), "decay"),
    "key_bits_normal": (("key",), "bits"),
    "value_bits_normal": (("value",), "bits"),
    "key_bits_sink_outlier": (("key",), "high_bits"),
    "value_bits_sink_outlier": (("value",), "high_bits"),
    "outlier_threshold_relative": (("key", "value"), "outlier_threshold_relative"),
    "outlier_threshold_abs": (("key", "value"), "outlier_threshold_abs"),
    "outlier_detection_enabled": (("key", "value"), "outlier_detection"),
    "value_quant_groups": (("value",), "groups"),
}
"""Recipe entries and field of each option."""

_ONLY = {
    "key_quant_per_channel": (True, "keys have a scale per channel; for one per token use method: uniform, per: token"),
    "enable_mixed_precision_cache": (True, "sinks, promoted and other channels are always stored at their own widths"),
    "adaptive_chunk_size": (False, "chunks have one size, so that a cache stores what was simulated"),
    "periodic_stat_reset": (False, "the running statistics are reset at the start of each sequence only"),
}
"""Options with one possible value here, and the reason."""

_MEANINGLESS = {
    "stat_reset_interval": "the running statistics are reset at the start of each sequence only",
    "log_statistics": "a recipe logs nothing; reports count the bits",
    "verbose": "a recipe prints nothing",
}

_ADVICE = {
    "bits": "; from 2 to 8, or 16 to keep everything in full precision, promoted channels included",
    "high_bits": "; promoted channels have from 2 to 8 bits, sink tokens always 16",
}


def compression_config(**options: Any) -> dict[str, Any]:
    """Recipe with the options of the original `CompressionConfig`, and the defaults of its README.

    Sink tokens always have 16 bits, so `*_bits_sink_outlier` is the width of promoted channels alone. A `*_bits_normal`
    of 16 keeps the keys, or the values, in full precision.

    Parameters
    ----------
    **options
        Options by their original names: `chunk_size`, `ema_decay`, `attention_sink_size`, `key_bits_normal`, ...

    Raises
    ------
    ValueError
        If options are unknown, out of range, contradictory or without meaning here; names all of them.

    Examples
    --------
    >>> recipe = compression_config(chunk_size=128, key_bits_normal=3, attention_sink_size=2)
    >>> recipe["key"]["chunk_tokens"], recipe["key"]["bits"], recipe["value"]["bits"], recipe["sink_tokens"]
    (128, 3, 4, 2)
    """
    problems = [f"{name}: {problem}" for name, value in options.items() if (problem := _problem(name, value))]
    entries: dict[str, dict[str, Any]] = {}
    for tensor in ("key", "value"):
        given = {
            field: options[name] for name, (tensors, field) in _FIELDS.items() if name in options and tensor in tensors
        }
        try:
            entries[tensor] = _entry(given)
        except ValidationError as error:
            problems += [_in_their_words(row, tensor) for row in error.errors()]
    if problems:
        raise InvalidValueError("compression_config: " + "; ".join(dict.fromkeys(problems)))
    return {
        "name": "streaming",
        "source": "Real-Time Prefill KV Cache Compression: running maxima, promoted outlier channels, no calibration",
        "stage": "pre_rope" if options.get("quantize_pre_rope", True) else "post_rope",
        **entries,
        "sink_tokens": options.get("attention_sink_size", 4),
    }


def _problem(name: str, value: object) -> str | None:
    """Problem of an option that is no field of an estimator; None if it is valid."""
    if name in _FIELDS:
        return None
    if name == "attention_sink_size":
        fits = type(value) is int and 0 <= value <= FIRST_POSITIONS
        return None if fits else f"expected an integer from 0 to {FIRST_POSITIONS}; got {value!r:.60}"
    if name == "quantize_pre_rope":
        return None if type(value) is bool else f"expected true or false; got {value!r:.60}"
    if name in _ONLY:
        only, reason = _ONLY[name]
        return None if value is only else f"must be {str(only).lower()} here: {reason}; got {value!r:.60}"
    if name in _MEANINGLESS:
        return f"has no meaning here: {_MEANINGLESS[name]}; remove it"
    known = [*_FIELDS, "attention_sink_size", "quantize_pre_rope", *_ONLY]
    near = difflib.get_close_matches(name, known, n=1)
    return f"unknown option; did you mean {near[0]}?" if near else f"unknown option; known: {', '.join(known)}"


def _entry(given: dict[str, Any]) -> dict[str, Any]:
    """Recipe entry for keys or values."""
    # 16 bits for all channels, promoted ones included, is full precision.
    if given.get("bits") == 16 and given.get("high_bits", 16) == 16:
        return {"method": "identity"}
    return StreamingEstimator(**given).model_dump(mode="json")


def _in_their_words(row: Any, tensor: str) -> str:
    """Message of the estimator's validation with the original option names."""
    theirs = {field: name for name, (tensors, field) in _FIELDS.items() if tensor in tensors}
    if row["loc"]:
        field = row["loc"][0]
        return f"{theirs[field]}: {row['msg']}; got {row['input']!r:.60}{_ADVICE.get(field, '')}"
    message = re.sub(r"\w+_\w+", lambda word: theirs.get(word[0], word[0]), row["msg"])
    return message.removeprefix("Value error, ")
