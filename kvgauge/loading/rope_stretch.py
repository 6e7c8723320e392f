"""A context longer than the one that a model was made for, by linear scaling of RoPE."""

import math
from typing import Any

from kvgauge.terminal.console import UsageError

_LINEAR = {"default": "linear", "linear": "linear", "proportional": "proportional"}
"""By the type that a model has: the one whose `factor` divides its frequencies, and nothing else."""

_LOCAL = ("sliding_attention", "chunked_attention")
"""Layers that see a window: no distance in them grows with the context, so that they keep their frequencies."""


def stretch(config: Any, max_tokens: int | None) -> None:
    """Divides the frequencies by a whole factor where more tokens are asked for than the model was made for.

    A factor that the model has already is multiplied.

    Parameters
    ----------
    config : PretrainedConfig
        Of the model; changed in place.
    max_tokens : int or None
        The context that is asked for.

    Raises
    ------
    UsageError
        If positions are learned or have no limit, or RoPE is scaled in a way that cannot be stretched further.
    """
    own = config.get_text_config()
    limit = getattr(own, "max_position_embeddings", None)
    if max_tokens is None or (limit and max_tokens <= limit):
        return
    who = f"--maxseqlen {max_tokens}"
    if not limit or getattr(own, "alibi", False):
        raise UsageError(f"{who}: {own.model_type} has no limit on positions; use --seqlen alone")
    # Position interpolation (arXiv 2306.15595): RoPE turns pair i of a head by position * frequency_i. With all
    # frequencies divided by f, position f * n has the angle that position n had in training. f is whole, as in KVQuant.
    factor = float(math.ceil(max_tokens / limit))
    for rope in global_ropes(own, who):
        rope["rope_type"] = _LINEAR[rope["rope_type"]]
        rope["factor"] = factor * (rope.get("factor") or 1.0)
    own.max_position_embeddings = max_tokens


def global_ropes(config: Any, who: str) -> list[dict[str, Any]]:
    """Parameters that can be scaled: one set, or that of each type of layer that sees the whole context.

    Parameters
    ----------
    config : PretrainedConfig
        Of the text model.
    who : str
        What asks for it, for messages.

    Raises
    ------
    UsageError
        If there are none, or they cannot be stretched.
    """
    parameters = getattr(config, "rope_parameters", None) or {}
    by_type = {name: rope for name, rope in parameters.items() if isinstance(rope, dict)}
    ropes: list[dict[str, Any]] = (
        [rope for name, rope in by_type.items() if name not in _LOCAL] if by_type else [parameters]
    )
    if not parameters or not ropes:
        raise UsageError(
            f"{who}: {config.model_type} has no RoPE to scale: its positions are learned or "
            f"computed otherwise. Use at most its {config.max_position_embeddings} tokens"
        )
    for rope in ropes:
        if rope.get("rope_type") not in _LINEAR:
            raise UsageError(
                f"{who}: the RoPE of {config.model_type} is scaled already, by {rope.get('rope_type')!r} to "
                f"{config.max_position_embeddings} tokens, which linear scaling cannot be added to. Edit "
                "rope_parameters in config.json, or use fewer tokens"
            )
    return ropes
