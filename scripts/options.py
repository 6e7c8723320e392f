"""Options of the command line, and the recipe edits that they stand for."""

import argparse
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from scripts.console import UsageError

if TYPE_CHECKING:
    from artifacts.importers import Hints

DEMO = "demo"
BITS = (1, 2, 3, 4, 5, 6, 7, 8, 16)
_PROJECTIONS = {"k_proj": "key", "v_proj": "value"}


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """What to run, and on what."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "model",
        nargs="?",
        metavar="MODEL",
        help="folder or hub id of a causal language model (default: demo, the bundled one)",
    )
    group.add_argument(
        "--device", help="cpu, cuda, cuda:1, ... or 'auto' for accelerate's device map (default: cuda if there)"
    )
    group.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="of the model; statistics are always float32 or wider (default: as stored)",
    )
    group.add_argument(
        "--maxseqlen",
        type=positive,
        metavar="N",
        help="stretch RoPE linearly to this context, as KVQuant does (default: the model's own)",
    )
    group.add_argument("--no-flash-attn", action="store_true", help=argparse.SUPPRESS)
    group.add_argument("--verbose", action="store_true", help="log what happens")
    group.add_argument("--debug", action="store_true", help="show the traceback of an error")


def add_text_options(parser: argparse.ArgumentParser) -> None:
    """What to read."""
    group = parser.add_argument_group("text")
    group.add_argument(
        "--dataset",
        "--datasets",
        metavar="NAME|FILE",
        help="demo, wikitext2, c4, ptb, or a .txt, .jsonl or .npy file (default: demo for the demo model, else "
        "wikitext2)",
    )
    group.add_argument("--field", default="text", help="field of a .jsonl file (default: text)")
    group.add_argument(
        "--seqlen",
        type=positive,
        metavar="N",
        help="tokens per window (default: 2048 or the model's context, whichever is smaller)",
    )
    group.add_argument("--seed", type=int, default=0)


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


def choose_defaults(args: argparse.Namespace) -> None:
    """The demo model where none is named, and the text that goes with the model."""
    args.model = args.model or DEMO
    args.dataset = args.dataset or (DEMO if args.model == DEMO else "wikitext2")


def add_foreign_options(parser: argparse.ArgumentParser) -> None:
    """What a file of another tool does not say."""
    group = parser.add_argument_group("what a file of another tool does not say")
    group.add_argument("--abits", "--bits", type=int, choices=BITS[:-1], metavar="N", help="bits of its codes")
    group.add_argument("--nuq", action=argparse.BooleanOptionalAction, default=None, help="it must hold codebooks")
    add_normal_float(group)
    group.add_argument(
        "--include-sparse", action=argparse.BooleanOptionalAction, default=None, help="its ranges leave outliers out"
    )
    group.add_argument("--sparsity-threshold", type=float, metavar="SHARE", help="share kept dense (default: 0.99)")
    group.add_argument("--first-few-fp16", type=int, metavar="N", help="first tokens kept exact (default: 0)")


def add_normal_float(parser: Any) -> None:
    """Only other tools' files need this one."""
    parser.add_argument("--nf", action="store_true", help="ranges of a KVQuant file stand for NormalFloat levels")


def foreign_hints(args: argparse.Namespace) -> "Hints":
    """What the command line says of a file of another tool."""
    from artifacts.importers import Hints

    sparse = _outliers(args, {}) if args.include_sparse is not None or args.sparsity_threshold is not None else None
    return Hints(
        bits=args.abits,
        codebooks=args.nuq if not args.nf else None,
        normal_float=args.nf,
        outlier_fraction=sparse["fraction"] if sparse else None,
        sink_tokens=max(0, args.first_few_fp16 or 0),
    )


def refuse_given(args: argparse.Namespace, names: Sequence[str], why: str) -> None:
    """Options that would have no effect are refused instead of ignored.

    Raises
    ------
    UsageError
        If any of them is given.
    """
    given = [name for name in names if vars(args).get(name) not in (None, False)]
    if given:
        raise UsageError(", ".join(f"--{name}".replace("_", "-") for name in given) + f": {why}")


def whole(text: str) -> int:
    """An integer from 0."""
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"expected an integer from 0, got {text!r}")
    return int(text)


def positive(text: str) -> int:
    """An integer from 1."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected an integer from 1, got {text!r}")
    return int(text)


def shard(text: str) -> tuple[int, int]:
    """`2/4` for the second of four shards."""
    number, _, total = text.partition("/")
    if not (number.isdigit() and total.isdigit() and 1 <= int(number) <= int(total)):
        raise argparse.ArgumentTypeError(f"expected I/N with I from 1 to N, such as 2/4; got {text!r}")
    return int(number), int(total)


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
        changes["outliers"] = _outliers(args, base)
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


def _outliers(args: argparse.Namespace, base: dict[str, Any]) -> dict[str, Any] | None:
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
