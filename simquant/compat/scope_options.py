"""Eviction settings under the option names of SCOPE and KIVI-SCOPE."""

import difflib
import re
from collections.abc import Mapping
from typing import Any

from artifacts.errors import InvalidValueError
from simquant.policy.eviction import Eviction

_SCOPE_NAMES = {
    "method": "prefill",
    "max_capacity_prompt": "prefill_tokens",
    "max_capacity_prompts": "prefill_tokens",
    "prefill_window_size": "prefill_tokens",
    "window_size": "prefill_recent_tokens",
    "prefill_recent_size": "prefill_recent_tokens",
    "pooling": "pooling",
    "kernel_size": "kernel_tokens",
    "decoding_metric": "decoding",
    "decoding_window_size": "decoding_tokens",
    "decoding_recent_size": "decoding_recent_tokens",
    "delta": "growth_steps",
}
_SCOPE_VALUES = {"allkv": "all", "fullkv": "all", "streamingllm": "streaming_llm", "avgpool": "avg", "maxpool": "max"}


def from_scope_options(**options: Any) -> Eviction:
    """Eviction settings from options of SCOPE or KIVI-SCOPE, under their names.

    Raises
    ------
    ValueError
        If an option is unknown (with the nearest known one), if two options mean the same setting, or as `Eviction`.

    Examples
    --------
    >>> from_scope_options(method="SnapKV", prefill_window_size=512, prefill_recent_size=8).prefill_tokens
    512
    """
    found: dict[str, Any] = {}
    for name, value in options.items():
        if name not in _SCOPE_NAMES:
            near = difflib.get_close_matches(name, _SCOPE_NAMES, n=1)
            nearest = f" Nearest: {near[0]}." if near else ""
            raise InvalidValueError(f"SCOPE: unknown option {name!r}; known are {', '.join(_SCOPE_NAMES)}.{nearest}")
        if _SCOPE_NAMES[name] in found:
            raise InvalidValueError(
                f"SCOPE: expected one option for {_SCOPE_NAMES[name]}; got {name} beside another. Remove one of them"
            )
        found[_SCOPE_NAMES[name]] = _scope_value(value)
    try:
        return Eviction(**found)
    except ValueError as error:
        raise InvalidValueError(_in_scope_names(str(error), options)) from error


def _in_scope_names(message: str, options: Mapping[str, Any]) -> str:
    """Error message with the names of the given options in place of fields of `Eviction`."""
    # Several options may name one field: the one that was given comes last and replaces the others.
    spelt = {_SCOPE_NAMES[name]: name for name in (*_SCOPE_NAMES, *options)}
    words = spelt | {value: option for option, value in _SCOPE_VALUES.items() if option != "fullkv"}
    return re.sub(r"\b[a-z_]+\b", lambda word: words.get(word[0], word[0]), message)


def _scope_value(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    return None if value.lower() == "none" else _SCOPE_VALUES.get(value.lower(), value.lower())
