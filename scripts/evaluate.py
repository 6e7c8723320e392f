"""`evaluate`: what a quantized cache costs a model on some text, against the same model in full precision."""

import argparse
import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scripts import options
from scripts.console import Parser, UsageError, bar, listing_of_runs, run, say, set_up_logging
from scripts.protocol_options import add_protocol_options, protocol_settings

if TYPE_CHECKING:
    from artifacts.artifact import Artifact
    from artifacts.quantizer import Quantizer
    from artifacts.sites import Site
    from calib.recipe import Recipe
    from scripts.models import LoadedModel

IMPORTED = "imported"
_RECIPE_FLAGS = ("recipe", "key_bits", "value_bits", "symmetric", "clamp", "stage")


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    return run("evaluate", _main, argv)


def parser() -> argparse.ArgumentParser:
    """The options of `evaluate`."""
    parser = Parser("evaluate", __doc__)
    options.add_model_options(parser)
    options.add_text_options(parser)
    options.add_recipe_options(parser, "that of the artifact; kvquant without one")
    parser.add_argument(
        "--quantizer-path", type=Path, metavar="FILE", help="what `calibrate` wrote; without it scales are dynamic"
    )
    options.add_normal_float(parser)
    add_protocol_options(parser)
    parser.add_argument("--limit", type=options.positive, metavar="N", help="windows at most (default: all)")
    parser.add_argument(
        "--batch-size", type=options.positive, default=1, metavar="N", help="windows per forward pass (default: 1)"
    )
    parser.add_argument(
        "--normalization",
        choices=("targets", "gptq"),
        default="targets",
        help="perplexity over all targets, or as GPTQ and KVQuant over the windows' means",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--nsamples", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--calibrate", action="store_true", help=argparse.SUPPRESS)
    return parser


def _main(argv: list[str]) -> int:
    if "--calibrate" in argv:
        from scripts import calibrate

        return calibrate._main(argv)
    args = parser().parse_args(argv)
    set_up_logging(args.verbose)
    artifact = _load_artifact(args)
    recipe = _recipe(args, artifact)
    if args.model is None and artifact is not None:
        args.model = artifact.manifest.model_id
        if args.model is None:
            raise UsageError(
                "name the model: evaluate MODEL --quantizer-path FILE (a local folder's path is not kept in the file)"
            )
    options.choose_defaults(args)
    from calib.corpus import check_dataset
    from scripts.models import load_model

    names = [name for name in args.dataset.split(",") if name] or [args.dataset]
    for name in names:
        check_dataset(name)
    loaded = load_model(args)
    results = {name: _evaluate(args, loaded, artifact, recipe, name) for name in names}
    first, *others = results.values()
    if args.json:
        print(json.dumps({"datasets": results} if others else first, indent=2, allow_nan=False))
    return 0


def _evaluate(
    args: argparse.Namespace, loaded: "LoadedModel", artifact: "Artifact | None", recipe: "Recipe | None", dataset: str
) -> dict[str, Any]:
    from artifacts.evidence import text_config
    from calib.corpus import load_corpus
    from calib.windows import check_vocabulary, split_windows
    from simquant import evaluate

    layers = loaded.layers()
    if artifact is not None:
        artifact.check_model(loaded.fingerprint(layers))
    seqlen = loaded.window_tokens(args.seqlen)
    corpus = load_corpus(dataset, "evaluation", loaded.encode, field=args.field)
    windows = split_windows(corpus, seqlen=seqlen, limit=args.limit)
    check_vocabulary(windows, text_config(loaded.model).vocab_size, corpus.name)
    if artifact is not None:
        _warn_of_overlap(artifact, windows)
    sink_tokens = artifact.manifest.sink_tokens if artifact is not None else recipe.sink_tokens if recipe else 0
    if args.first_few_fp16 is not None:
        sink_tokens = max(0, args.first_few_fp16)
    quantizers = artifact if artifact is not None else _dynamic(recipe, layers)
    if artifact is None and args.protocol == "full":
        _warn_of_later_tokens(quantizers)
    result = evaluate(
        loaded.model,
        windows,
        quantizers,
        **protocol_settings(args, quantizers, sink_tokens),
        batch_size=args.batch_size,
        normalization=args.normalization,
        progress=lambda batches: bar(batches, "evaluating"),
    )
    if not args.json:
        print(
            f"{args.model} on {corpus.name}"
            + (f", {args.quantizer_path}" if args.quantizer_path else ", dynamic scales")
        )
        print(result.table())
    return result.to_json()


def _load_artifact(args: argparse.Namespace) -> "Artifact | None":
    """The artifact, foreign or not; with what had to be assumed said.

    Raises
    ------
    UsageError
        If there is none, or flags that describe quantizers go with an imported file that holds them already.
    """
    from artifacts.importers import Hints, open_artifact

    if args.quantizer_path is None:
        if all(value is None for value in (args.abits, args.key_bits, args.value_bits, args.recipe)):
            raise UsageError(
                "name an artifact with --quantizer-path FILE, or bits for dynamic scales with --abits N. "
                + listing_of_runs()
            )
        return None
    if not args.quantizer_path.exists():
        raise UsageError(f"{args.quantizer_path}: no such file. {listing_of_runs()}")
    hints = options.foreign_hints(args)
    opened = open_artifact(args.quantizer_path, hints)
    for notice in opened.notices:
        say(f"note: {notice}")
    if opened.artifact.manifest.recipe.get("name") == IMPORTED:
        given = [name for name in _RECIPE_FLAGS if getattr(args, name) is not None]
        if given or (hints != Hints() and not opened.notices):
            flags = ", ".join(f"--{name}".replace("_", "-") for name in given) or "flags that describe quantizers"
            raise UsageError(f"{args.quantizer_path} was imported and holds its quantizers as they are; drop {flags}")
    return opened.artifact


def _recipe(args: argparse.Namespace, artifact: "Artifact | None") -> "Recipe | None":
    """The recipe of the artifact, with which the flags must agree; or the one that dynamic scales follow.

    None for an imported artifact, which had none.

    Raises
    ------
    UsageError
        If flags ask for other quantizers than the artifact holds.
    """
    from calib.recipe import Recipe, load_recipe

    if artifact is None:
        recipe = load_recipe(args.recipe or "kvquant")
        return recipe.edited(options.recipe_changes(args, recipe.model_dump(mode="json")))
    if artifact.manifest.recipe.get("name") == IMPORTED:
        return None
    recipe = Recipe.parse(dict(artifact.manifest.recipe), str(args.quantizer_path))
    base = recipe.model_dump(mode="json")
    asked = recipe.edited(options.recipe_changes(args, base)).model_dump(mode="json")
    rows = [row for name in ("stage", "key", "value") for row in _differences(name, base[name], asked[name])]
    if args.recipe and load_recipe(args.recipe).name != recipe.name:
        rows.append(f"recipe: the file has {recipe.name}, the command line {args.recipe}")
    if rows:
        raise UsageError(
            f"{args.quantizer_path}: the flags contradict the artifact:\n  "
            + "\n  ".join(rows)
            + "\nDrop the flags, or calibrate again with them."
        )
    return recipe


def _differences(name: str, held: Any, asked: Any) -> list[str]:
    if isinstance(held, Mapping) and isinstance(asked, Mapping):
        keys = sorted({*held, *asked})
        return [row for key in keys for row in _differences(f"{name}.{key}", held.get(key), asked.get(key))]
    return [] if held == asked else [f"{name}: the file has {held}, the command line {asked}"]


def _dynamic(recipe: "Recipe | None", layers: Any) -> "dict[Site, Quantizer]":
    from calib.capture import site_shapes
    from calib.layer_choice import check

    assert recipe is not None
    shapes = {shape.site: shape for shape in site_shapes(layers, recipe.stage)}
    estimators = check(recipe, list(shapes.values()))
    return {site: estimator.dynamic(shapes[site]) for site, estimator in estimators.items()}


def _warn_of_later_tokens(quantizers: "Mapping[Site, Quantizer]") -> None:
    if any(quantizer.tokens_per_scale != 1 for quantizer in quantizers.values()):
        say(
            "warning: a dynamic scale per channel is not causal: it looks at the later tokens of its window, which no "
            "cache can do, so the figures are too good. Calibrate for static scales, or use --pertoken k_proj v_proj."
        )


def _warn_of_overlap(artifact: "Artifact", windows: Any) -> None:
    from calib.windows import NGRAM_TOKENS, overlap_fraction

    if artifact.ngrams is None or not len(artifact.ngrams) or windows.shape[1] < NGRAM_TOKENS:
        return
    share = overlap_fraction(windows, artifact.ngrams)
    if math.isfinite(share) and share > 0.001:
        say(
            f"warning: about {share:.1%} of the evaluation text was calibrated on (runs of {NGRAM_TOKENS} tokens); "
            "the loss may look smaller than it is. Evaluate on other text."
        )


if __name__ == "__main__":
    sys.exit(main())
