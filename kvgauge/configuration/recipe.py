"""The recipe of a run, and the edits that options make to it."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from kvgauge.terminal.console import UsageError

if TYPE_CHECKING:
    from artifacts.importers import Hints

_PROJECTIONS = {"k_proj": "key", "v_proj": "value"}


@dataclass(frozen=True, kw_only=True)
class RecipeConfig:
    """A recipe, and edits to it; what is None is left as the recipe has it.

    Parameters
    ----------
    recipe : str or None
        A shipped one, or a file; None where none was named.
    abits, key_bits, value_bits : int or None
        Bits for both, for keys, for values; 16 is exact.
    target_bits : float or None
        Mean bits of all sites, allocated among them.
    nuq : bool or None
        Codebooks by k-means, or uniform grids.
    include_sparse : bool or None
        Outliers are kept beside the codes.
    sparsity_threshold : float or None
        Fraction of values that are quantized; the rest are outliers.
    perchannel, pertoken : sequence of str or None
        k_proj and v_proj: which have a range for each channel, and which for each token.
    symmetric, clamp : bool or None
        Grids centred on zero; zero points rounded to integers inside the code range.
    first_few_fp16 : int, 'auto' or None
        First tokens kept exact; 'auto' lets calibration choose their number.
    stage : {'pre_rope', 'post_rope'} or None
        Keys before or after RoPE.
    nf : bool
        Ranges of a KVQuant file stand for NormalFloat levels.
    """

    recipe: str | None = None
    abits: int | None = None
    key_bits: int | None = None
    value_bits: int | None = None
    target_bits: float | None = None
    nuq: bool | None = None
    include_sparse: bool | None = None
    sparsity_threshold: float | None = None
    perchannel: Sequence[str] | None = None
    pertoken: Sequence[str] | None = None
    symmetric: bool | None = None
    clamp: bool | None = None
    first_few_fp16: int | Literal["auto"] | None = None
    stage: Literal["pre_rope", "post_rope"] | None = None
    nf: bool = False

    @property
    def sink_tokens(self) -> int | Literal["auto"] | None:
        """First tokens kept exact, where the option was given; the ancestors write -1 for none."""
        return max(0, self.first_few_fp16) if isinstance(self.first_few_fp16, int) else self.first_few_fp16


def recipe_changes(config: RecipeConfig, base: dict[str, Any]) -> dict[str, Any]:
    """The edits to the recipe `base` that the flags stand for."""
    changes: dict[str, Any] = {
        tensor: _site_changes(config, tensor, base[tensor], bits)
        for tensor, bits in (("key", config.key_bits), ("value", config.value_bits))
    }
    if config.sink_tokens is not None:
        changes["sink_tokens"] = config.sink_tokens
    for name in ("stage", "target_bits"):
        if getattr(config, name) is not None:
            changes[name] = getattr(config, name)
    return {name: change for name, change in changes.items() if change != {}}


def _site_changes(config: RecipeConfig, tensor: str, base: dict[str, Any], own_bits: int | None) -> dict[str, Any]:
    bits = own_bits if own_bits is not None else config.abits
    scope = _scope(config, tensor)
    if bits == 16 or scope == "none":
        return {"method": "identity"}
    changes: dict[str, Any] = {}
    if bits is not None:
        changes["bits"] = bits
    if scope is not None:
        changes["per"] = scope
    if config.include_sparse is not None or config.sparsity_threshold is not None:
        changes["outliers"] = outlier_entry(config, base)
    for flag, name in ((config.symmetric, "symmetric"), (config.clamp, "whole_zero_point")):
        if flag is not None:
            changes[name] = flag
    return _with_method(config, tensor, base, changes)


def _with_method(config: RecipeConfig, tensor: str, base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """The edits; where the method changes, all of the entry, without what the other method does not know.

    A site that the recipe keeps exact stays so, unless bits are asked for.
    """
    if base["method"] == "identity" and "bits" not in changes:
        return {}
    is_wrapped, core = "inner" in base, _innermost(base)
    # Levels are by k-means in both kinds of codebooks. An edit that a wrapped entry does not know replaces it.
    nuq = None if config.nuq and core["method"] in ("codebook", "mixed_codebook") else config.nuq
    if is_wrapped and nuq is None and all(_knows(base, name) for name in changes):
        return changes
    kept = "codebook" if is_wrapped or base["method"] == "identity" else base["method"]
    wanted = kept if nuq is None else ("codebook" if nuq else "uniform")
    bits = {"bits": round(core["bits"])} if "bits" in core else {}
    merged = {"per": "channel" if tensor == "key" else "token", **bits, **base, **changes}
    if wanted == base["method"]:
        return {**changes, **_per_token_codebook(merged)}
    # Another method: only the entries that both know are kept. Errors of key channels are weighted by their queries,
    # those within a token's range by the square of its scale.
    entry: dict[str, Any] = {"method": wanted}
    entry |= {name: merged[name] for name in ("bits", "per", "outliers", "threshold_dtype") if name in merged}
    entry |= {name: changes[name] for name in ("symmetric", "whole_zero_point") if name in changes}
    if wanted == "codebook":
        by_queries = tensor == "key" and merged["per"] == "channel"
        entry["weights"] = "query" if by_queries else "scale2"
    return entry


def _innermost(entry: dict[str, Any]) -> dict[str, Any]:
    return _innermost(entry["inner"]) if "inner" in entry else entry


def _knows(entry: dict[str, Any], name: str) -> bool:
    return name in entry or ("inner" in entry and _knows(entry["inner"], name))


def _per_token_codebook(entry: dict[str, Any]) -> dict[str, Any]:
    """Settings that a codebook has to give up when its ranges are those of the tokens."""
    if entry["method"] != "codebook" or entry["per"] != "token":
        return {}
    tables = {"tables": "site"} if entry["tables"] == "channel" else {}
    weights = {"weights": "scale2"} if entry["weights"].startswith("query") else {}
    return tables | weights


def _scope(config: RecipeConfig, tensor: str) -> str | None:
    if config.perchannel is None and config.pertoken is None:
        return None
    channel, token = (_tensors(words) for words in (config.perchannel, config.pertoken))
    if (channel == set() and token is None) or (token == set() and channel is None):
        raise UsageError("--perchannel and --pertoken need values: k_proj, v_proj or both, such as --perchannel k_proj")
    if channel is not None and token is not None and channel & token:
        raise UsageError(f"--perchannel and --pertoken both name {', '.join(sorted(channel & token))}; name each once")
    if channel and tensor in channel:
        return "channel"
    if token and tensor in token:
        return "token"
    # Both options are given and neither names this tensor: the ancestors leave it in full precision.
    return "none" if channel is not None and token is not None else None


def _tensors(words: Sequence[str] | None) -> set[str] | None:
    if words is None:
        return None
    names = re.findall(r"[^][\s,\"']+", " ".join(words))  # words, a comma list, or the ancestors' JSON list
    unknown = [name for name in names if name not in _PROJECTIONS]
    if unknown:
        raise UsageError(
            f"--perchannel, --pertoken: expected k_proj or v_proj; got {unknown[0]!r}. Put MODEL before these options"
        )
    return {_PROJECTIONS[name] for name in names}


def outlier_entry(config: RecipeConfig, base: dict[str, Any]) -> dict[str, Any] | None:
    """A recipe's entry `outliers`, as the options have it.

    Raises
    ------
    UsageError
        If the fraction is out of range, or given without outliers.
    """
    if config.include_sparse is False:
        return None
    old = base.get("outliers")
    dense = config.sparsity_threshold if config.sparsity_threshold is not None else 0.99
    if not 0.5 < dense <= 1:
        raise UsageError(
            f"--sparsity-threshold: expected the fraction of values quantized, above 0.5 and at most 1; got {dense}"
        )
    if dense == 1:
        return None
    if config.include_sparse is None and old is None:
        raise UsageError("--sparsity-threshold: no effect without outliers; add --include-sparse")
    # 1 - 0.99 is 0.010000000000000009 in binary: without rounding it would be another recipe than fraction: 0.01.
    return {"rule": (old or {}).get("rule", "percentile"), "fraction": round(1 - dense, 12)}


def foreign_hints(config: RecipeConfig) -> "Hints":
    """The same options as they describe a file of another tool, which does not say these things itself."""
    from artifacts.importers import Hints

    named = config.include_sparse is not None or config.sparsity_threshold is not None
    sparse = outlier_entry(config, {}) if named else None
    return Hints(
        bits=config.abits,
        codebooks=config.nuq if not config.nf else None,
        normal_float=config.nf,
        outlier_fraction=sparse["fraction"] if sparse else None,
        sink_tokens=config.sink_tokens if isinstance(config.sink_tokens, int) else 0,
    )
