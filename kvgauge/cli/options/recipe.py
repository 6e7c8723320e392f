"""Options of the command line that edit a recipe."""

import argparse
import re
from typing import Any

from kvgauge.cli.options.common import BITS
from kvgauge.terminal.console import UsageError

_PROJECTIONS = {"k_proj": "key", "v_proj": "value"}


def add_recipe_options(parser: argparse.ArgumentParser, default_recipe: str) -> None:
    """Which quantizers; every flag edits the recipe."""
    group = parser.add_argument_group("recipe")
    group.add_argument(
        "--recipe", default=None, metavar="NAME|FILE", help=f"shipped recipe or .yaml file (default: {default_recipe})"
    )
    group.add_argument(
        "--abits", "--bits", type=int, choices=BITS, metavar="N", help="bits for keys and values; 16 is exact"
    )
    group.add_argument(
        "--target-bits",
        type=float,
        metavar="B",
        help="mean bits of all keys and values, shared out among the sites (recipes that allot levels)",
    )
    group.add_argument("--key-bits", "--kbits", type=int, choices=BITS, metavar="N", help="bits for keys")
    group.add_argument("--value-bits", "--vbits", type=int, choices=BITS, metavar="N", help="bits for values")
    group.add_argument(
        "--nuq",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="non-uniform codebooks by k-means, or uniform grids",
    )
    group.add_argument(
        "--include-sparse", action=argparse.BooleanOptionalAction, default=None, help="keep outliers beside the codes"
    )
    group.add_argument("--sparsity-threshold", type=float, metavar="SHARE", help="share kept dense (default: 0.99)")
    group.add_argument("--perchannel", nargs="*", metavar="PROJ", help="k_proj and/or v_proj: one range per channel")
    group.add_argument("--pertoken", nargs="*", metavar="PROJ", help="k_proj and/or v_proj: each token's own range")
    group.add_argument("--symmetric", action="store_true", default=None, help="uniform grids centred on zero")
    group.add_argument("--clamp", action="store_true", default=None, help="whole zero points within the code range")
    group.add_argument("--first-few-fp16", type=int, metavar="N", help="first tokens kept exact, 0 to 8")
    group.add_argument("--stage", choices=("pre_rope", "post_rope"), help="where keys are taken")


def recipe_changes(args: argparse.Namespace, base: dict[str, Any]) -> dict[str, Any]:
    """The edits to the recipe `base` that the flags stand for."""
    changes: dict[str, Any] = {
        tensor: _site_changes(args, tensor, base[tensor], bits)
        for tensor, bits in (("key", args.key_bits), ("value", args.value_bits))
    }
    if args.first_few_fp16 is not None:
        changes["sink_tokens"] = max(0, args.first_few_fp16)
    for name in ("stage", "target_bits"):
        if getattr(args, name) is not None:
            changes[name] = getattr(args, name)
    return {name: change for name, change in changes.items() if change != {}}


def _site_changes(args: argparse.Namespace, tensor: str, base: dict[str, Any], own_bits: int | None) -> dict[str, Any]:
    bits = own_bits if own_bits is not None else args.abits
    scope = _scope(args, tensor)
    if bits == 16 or scope == "none":
        return {"method": "identity"}
    changes: dict[str, Any] = {}
    if bits is not None:
        changes["bits"] = bits
    if scope is not None:
        changes["per"] = scope
    if args.include_sparse is not None or args.sparsity_threshold is not None:
        changes["outliers"] = outlier_entry(args, base)
    for flag, name in ((args.symmetric, "symmetric"), (args.clamp, "whole_zero_point")):
        if flag is not None:
            changes[name] = flag
    return _with_method(args, tensor, base, changes)


def _with_method(
    args: argparse.Namespace, tensor: str, base: dict[str, Any], changes: dict[str, Any]
) -> dict[str, Any]:
    """The edits; where the method changes, all of the entry, without what the other method does not know.

    A site that the recipe keeps exact stays so, unless bits are asked for.
    """
    if base["method"] == "identity" and "bits" not in changes:
        return {}
    kept = "codebook" if base["method"] == "identity" else base["method"]
    wanted = kept if args.nuq is None else ("codebook" if args.nuq else "uniform")
    merged = {"per": "channel" if tensor == "key" else "token", **base, **changes}
    if wanted == base["method"]:
        return {**changes, **_per_token_codebook(merged)}
    entry: dict[str, Any] = {"method": wanted}
    entry |= {name: merged[name] for name in ("bits", "per", "outliers", "threshold_dtype") if name in merged}
    entry |= {name: changes[name] for name in ("symmetric", "whole_zero_point") if name in changes}
    if wanted == "codebook":
        by_queries = tensor == "key" and merged["per"] == "channel"
        entry["weights"] = "query" if by_queries else "scale2"
    return entry


def _per_token_codebook(entry: dict[str, Any]) -> dict[str, Any]:
    """What a codebook entry has to give up when its ranges are those of the tokens."""
    if entry["method"] != "codebook" or entry["per"] != "token":
        return {}
    tables = {"tables": "site"} if entry["tables"] == "channel" else {}
    weights = {"weights": "scale2"} if entry["weights"].startswith("query") else {}
    return tables | weights


def _scope(args: argparse.Namespace, tensor: str) -> str | None:
    if args.perchannel is None and args.pertoken is None:
        return None
    channel, token = (_tensors(words) for words in (args.perchannel, args.pertoken))
    if (channel == set() and token is None) or (token == set() and channel is None):
        raise UsageError("--perchannel and --pertoken need k_proj and/or v_proj behind them")
    if channel is not None and token is not None and channel & token:
        raise UsageError(f"--perchannel and --pertoken both name {', '.join(sorted(channel & token))}; name each once")
    if channel and tensor in channel:
        return "channel"
    if token and tensor in token:
        return "token"
    return "none" if channel is not None and token is not None else None


def _tensors(words: list[str] | None) -> set[str] | None:
    if words is None:
        return None
    names = re.findall(r"[^][\s,\"']+", " ".join(words))  # words, a comma list, or the ancestors' JSON list
    unknown = [name for name in names if name not in _PROJECTIONS]
    if unknown:
        raise UsageError(f"expected k_proj and/or v_proj, got {unknown[0]!r} (MODEL stands before these options)")
    return {_PROJECTIONS[name] for name in names}


def outlier_entry(args: argparse.Namespace, base: dict[str, Any]) -> dict[str, Any] | None:
    """What a recipe says under `outliers`, as the flags have it.

    Raises
    ------
    UsageError
        If the share is out of range, or given without outliers.
    """
    if args.include_sparse is False:
        return None
    old = base.get("outliers")
    dense = args.sparsity_threshold if args.sparsity_threshold is not None else 0.99
    if not 0.5 < dense <= 1:
        raise UsageError(f"--sparsity-threshold is the share kept dense, above 0.5 and at most 1; got {dense}")
    if dense == 1:
        return None
    if args.include_sparse is None and old is None:
        raise UsageError("--sparsity-threshold says how many outliers --include-sparse keeps; add --include-sparse")
    return {"rule": (old or {}).get("rule", "percentile"), "fraction": round(1 - dense, 12)}
