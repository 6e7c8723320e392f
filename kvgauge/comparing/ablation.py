"""The ingredients of a recipe, and the recipe without each of them."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from calib.recipe.recipe import Recipe
from kvgauge.sweeping.settings import Settings

Entry = dict[str, Any]

_ROTATIONS = ("rotated", "hadamard")


@dataclass(frozen=True)
class Setup:
    """A recipe and how its cache is run."""

    recipe: Recipe
    settings: Settings


def without_sinks(setup: Setup) -> Setup | None:
    """The first tokens are quantized like the others, and so are later ones that are exact for being like them."""
    return _edited(setup, {"sink_tokens": 0}) if setup.recipe.sink_tokens else None


def without_exact_sinks(setup: Setup) -> Setup | None:
    """Later tokens that act like sinks are quantized like the others."""
    return _everywhere(setup, lambda entry: _inner(entry) if entry.get("method") == "exact_sinks" else entry)


def without_outliers(setup: Setup) -> Setup | None:
    """No value is kept apart: neither beyond percentiles or by rank, nor the few largest of each head."""

    def change(entry: Entry) -> Entry:
        if entry.get("method") == "compact_sparse":
            return _inner(entry)
        return {**entry, "outliers": None} if entry.get("outliers") else entry

    return _everywhere(setup, change)


def without_rotation(setup: Setup) -> Setup | None:
    """Vectors are quantized as they are, not in a fitted or a Hadamard basis."""
    return _everywhere(setup, lambda entry: _inner(entry) if entry.get("method") in _ROTATIONS else entry)


def without_weights(setup: Setup) -> Setup | None:
    """An error counts alike wherever it falls: by no queries, gradients or scales, in codebooks, bases and ranges."""

    def change(entry: Entry) -> Entry:
        if entry.get("method") == "codebook" and _weighs(entry):
            return {**entry, "weights": "none"}
        if entry.get("method") == "rotated":
            return {**entry, "metric": "none", "tokens": "alike"}
        return {**entry, "range": "mse"} if entry.get("range") == "attention" else entry

    return _everywhere(setup, change)


def without_window(setup: Setup) -> Setup | None:
    """Protocols with a window: no recent token stays in full precision but those that do not fill a group."""
    recipe, settings = setup.recipe, setup.settings
    asked = settings.residual_tokens or settings.block_tokens or settings.residual_length
    if settings.protocol == "full" or not (asked or recipe.cache):
        return None
    changes: Entry = dict.fromkeys(("residual_tokens", "block_tokens", "residual_length"))
    if recipe.cache:  # what its entry says besides the window stays, now as if it had been asked for
        for name in ("exact_prefill", "keep_smallest_norm"):
            own = getattr(settings, name)
            changes[name] = getattr(recipe.cache, name) if own is None else own
    return _edited(Setup(recipe, settings.model_copy(update=changes)), {"cache": None})


def without_pre_rope(setup: Setup) -> Setup | None:
    """Keys are quantized after RoPE."""
    return _edited(setup, {"stage": "post_rope"}) if setup.recipe.stage == "pre_rope" else None


def without_pooling(setup: Setup) -> Setup | None:
    """The table of a channel is fitted to nothing but the channel's own values."""

    def change(entry: Entry) -> Entry:
        own_tables = entry.get("method") == "mixed_codebook" or (entry.get("tables") == "channel" and _is_fitted(entry))
        return {**entry, "pooling": 0.0} if own_tables and entry.get("pooling") else entry

    return _everywhere(setup, change)


def without_centring(setup: Setup) -> Setup | None:
    """Means of channels are not taken out."""
    return _everywhere(setup, lambda entry: _inner(entry) if entry.get("method") == "centred" else entry)


def without_correction(setup: Setup) -> Setup | None:
    """Decoded vectors are not corrected: neither by Q-Norm, nor to the norm of the original, nor by the mean error."""

    def change(entry: Entry) -> Entry:
        return {**entry, **{name: False for name in ("qnorm", "correct") if entry.get(name)}}

    return _everywhere(setup, change)


def without_clipping(setup: Setup) -> Setup | None:
    """Ranges reach from the smallest to the largest value."""

    def change(entry: Entry) -> Entry:
        if entry.get("range", "minmax") != "minmax":
            entry = {**entry, "range": "minmax"}
        return {**entry, "clip_ratio": 1.0} if entry.get("clip_ratio", 1.0) != 1.0 else entry

    return _everywhere(setup, change)


def without_allotment(setup: Setup) -> Setup | None:
    """Every channel has as many levels, and at least as many bits as before: a loss is not for want of those."""

    setup = without_budget(setup) or setup

    def change(entry: Entry) -> Entry:
        if entry.get("method") != "mixed_codebook":
            return entry
        # The next whole number of bits: with fewer levels than before the loss would be that of the lost bits.
        alike = {"per": "channel", "tables": "channel", "weights": "none", "pooling": entry["pooling"]}
        return {"method": "codebook", "bits": math.ceil(entry["bits"]), **alike}

    return _everywhere(setup, change)


def without_budget(setup: Setup) -> Setup | None:
    """Every site has the mean bits that were allocated among all."""
    target = setup.recipe.target_bits
    if target is None:
        return None
    unshared = _edited(setup, {"target_bits": None})
    return (
        _everywhere(unshared, lambda e: {**e, "bits": target} if e.get("method") == "mixed_codebook" else e) or unshared
    )


def without_prediction(setup: Setup) -> Setup | None:
    """Nothing is predicted from other sites."""
    return _everywhere(setup, lambda entry: _inner(entry) if entry.get("method") == "predicted" else entry)


def without_overrides(setup: Setup) -> Setup | None:
    """No layer is treated unlike the others."""
    return _edited(setup, {"overrides": []}) if setup.recipe.overrides else None


INGREDIENTS: Mapping[str, Callable[[Setup], Setup | None]] = {
    "sinks": without_sinks,
    "exact_sinks": without_exact_sinks,
    "outliers": without_outliers,
    "rotation": without_rotation,
    "weights": without_weights,
    "window": without_window,
    "pre_rope": without_pre_rope,
    "pooling": without_pooling,
    "centring": without_centring,
    "correction": without_correction,
    "clipping": without_clipping,
    "allotment": without_allotment,
    "budget": without_budget,
    "prediction": without_prediction,
    "overrides": without_overrides,
}
"""By name, what makes a setup into one without the ingredient; None where it is absent."""


def _everywhere(setup: Setup, change: Callable[[Entry], Entry]) -> Setup | None:
    """The setup with a change to all entries for keys and values, also inside others and in overrides."""
    base = setup.recipe.model_dump(mode="json")
    changes: Entry = {name: _within(base[name], change) for name in ("key", "value")}
    changes["overrides"] = [
        {name: _within(entry, change) if name in ("key", "value") and entry else entry for name, entry in row.items()}
        for row in base["overrides"]
    ]
    return _edited(setup, changes) if any(base[name] != changes[name] for name in changes) else None


def _within(entry: Entry, change: Callable[[Entry], Entry]) -> Entry:
    inner = entry.get("inner")
    return change({**entry, "inner": _within(inner, change)} if isinstance(inner, dict) else entry)


def _edited(setup: Setup, changes: Entry) -> Setup:
    return Setup(setup.recipe.edited(changes), setup.settings)


def _inner(entry: Entry) -> Entry:
    inner: Entry = entry["inner"]
    return inner


def _is_fitted(entry: Entry) -> bool:
    return entry.get("method") == "codebook" and entry.get("levels") == "fitted"


def _weighs(entry: Entry) -> bool:
    """True where the weights change the fit: in a table of one channel those of whole channels do not."""
    own = entry["tables"] == "channel" and not entry["weights"].startswith("fisher")
    return _is_fitted(entry) and entry["weights"] != "none" and not own
