"""Losses on a text for `evaluate`: its windows, the targets in them that count, and what makes losses look better."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from kvgauge.configuration.evaluate import EvaluateConfig
from kvgauge.configuration.fields import flag
from kvgauge.configuration.protocol import ProtocolConfig
from kvgauge.configuration.scoring import ScoringConfig
from kvgauge.running.site_figures import site_figures
from kvgauge.terminal.console import UsageError, bar, say

if TYPE_CHECKING:
    from torch import Tensor

    from artifacts.artifact import Artifact
    from artifacts.quantizer import Quantizer
    from artifacts.sites import Site
    from calib.text.corpus import Corpus
    from calib.text.written import WrittenText
    from kvgauge.loading.models import LoadedModel
    from kvgauge.running.evaluated import Evaluated
    from simquant.evaluation.result import EvalResult
    from simquant.evaluation.scored_targets import ScoredTargets

_MOST_OF_C4 = 256
"""Windows of a text that is too long to be read whole, as without --stride."""


def run_text(config: EvaluateConfig, loaded: "LoadedModel", evaluated: "Evaluated", dataset: str) -> dict[str, Any]:
    """Evaluates one text, prints the table unless JSON is wanted, and returns what goes into the JSON.

    Parameters
    ----------
    config : EvaluateConfig
        Of the evaluation.
    loaded : LoadedModel
        Model and tokenizer.
    evaluated : Evaluated
        The quantizers.
    dataset : str
        A name or a file.
    """
    from artifacts.model.evidence import text_config
    from calib.text.windows import check_vocabulary
    from simquant import evaluate

    text, scoring = config.text, config.scoring
    start_token = loaded.start_token(text.bos)
    corpus = loaded.corpus(dataset, "evaluation", text.field)
    windows, scored = scored_windows(scoring, corpus, loaded.window_tokens(text.seqlen), start_token)
    check_vocabulary(windows, text_config(loaded.model).vocab_size, corpus.name)
    _warn(config, evaluated, windows, start_token)
    settings = evaluated.settings(config)
    _check_steps(config.protocol, windows.shape[1])
    result = evaluate(
        loaded.model,
        windows,
        evaluated.quantizers,
        **settings,
        **scoring_settings(scoring, scored, len(text.datasets)),
        batch_size=scoring.batch_size,
        normalization=scoring.normalization,
        progress=lambda batches: bar(batches, "evaluating"),
    )
    if config.json:
        tell(result)
    else:
        begun = "" if start_token is None else f", windows begun with token {start_token}"
        print(f"{config.model.name} on {corpus.name}{begun}, {config.quantizer_path or 'dynamic scales'}")
        print(result.table())
    start = {} if start_token is None else {"start_token": start_token}
    return result.to_json() | start | site_figures(config, loaded, evaluated.quantizers, windows, settings)


def _warn(config: EvaluateConfig, evaluated: "Evaluated", windows: "Tensor", start_token: int | None) -> None:
    """Says what makes the loss look smaller or larger than it is."""
    if evaluated.artifact is not None:
        warn_of_overlap(evaluated.artifact, windows)
        _warn_of_other_start(evaluated.artifact, start_token)
    elif config.protocol.protocol == "full":
        _warn_of_later_tokens(evaluated.quantizers)


def tell(result: "EvalResult") -> None:
    """Says why a result should not be believed, where no table does."""
    for warning in result.warnings:
        say(f"warning: {warning}")


def _check_steps(config: ProtocolConfig, n_tokens: int) -> None:
    """A step longer than a window would be named in the report and never made.

    Raises
    ------
    UsageError
        If one is asked for.
    """
    for name in ("prefill_tokens", "chunk_tokens"):
        if (getattr(config, name) or 1) > n_tokens:
            raise UsageError(
                f"{flag(name)} {getattr(config, name)}: windows have {n_tokens} tokens; use at most as many"
            )


def _warn_of_later_tokens(quantizers: "Mapping[Site, Quantizer]") -> None:
    if not all(quantizer.is_causal for quantizer in quantizers.values()):
        say(
            "warning: a dynamic scale per channel is not causal: it is computed from later tokens too, which no "
            "cache has yet, so the figures are too good. Calibrate for static scales, or use --pertoken k_proj v_proj."
        )


def _warn_of_other_start(artifact: "Artifact", start_token: int | None) -> None:
    corpus = artifact.manifest.corpus
    if corpus.n_windows and corpus.start_token != start_token:
        own, here = ("begin" if token is not None else "do not" for token in (corpus.start_token, start_token))
        say(
            f"note: windows of the calibration {own} with the start token, those evaluated {here}; use --bos in "
            "calibrate and evaluate alike"
        )


def warn_of_overlap(artifact: "Artifact", windows: Any) -> None:
    """Says it where evaluation text has been calibrated on."""
    from calib.text.sketches import NGRAM_TOKENS, overlap_fraction

    if artifact.ngrams is None or not len(artifact.ngrams) or windows.shape[1] < NGRAM_TOKENS:
        return
    share = overlap_fraction(windows, artifact.ngrams)
    # Common phrases repeat in unrelated texts as well; a thousandth of all runs is more than these make.
    if math.isfinite(share) and share > 0.001:
        say(
            f"warning: about {share:.1%} of the evaluation text was calibrated on (runs of {NGRAM_TOKENS} tokens); "
            "the loss may look smaller than it is. Evaluate on other text."
        )


def scored_windows(
    config: ScoringConfig, corpus: "Corpus | WrittenText", seqlen: int, start_token: int | None = None
) -> "tuple[Tensor, ScoredTargets | None]":
    """The windows to evaluate, and which of their targets count (None: all but the first of each).

    Parameters
    ----------
    config : ScoringConfig
        With `stride` and `limit`.
    corpus : Corpus or WrittenText
        The text.
    seqlen : int
        Tokens of a window.
    start_token : int or None
        First token of every window, one of its tokens.

    Raises
    ------
    UsageError
        If the stride is longer than a window, or the text has no windows that overlap.
    """
    from calib.text.corpus import LazyDocuments
    from calib.text.windows import begun, split_windows, without_start
    from calib.text.written import WrittenText
    from simquant.evaluation.scored_targets import strided_windows

    if config.stride is None:
        return split_windows(corpus, seqlen=seqlen, limit=config.limit, start_token=start_token), None
    if isinstance(corpus, WrittenText):
        raise UsageError("--stride: every window of --dataset self is a text of its own; remove --stride")
    if start_token is not None:
        # Windows are cut one token shorter, and the start token is put before each of them afterwards.
        windows, scored = scored_windows(config, without_start(corpus, seqlen, start_token), seqlen - 1)
        return begun(windows, start_token), scored
    if config.stride > seqlen:
        raise UsageError(
            f"--stride {config.stride}: longer than a window of {seqlen} tokens, so that some tokens would be skipped; "
            f"use at most {seqlen}"
        )
    limit = config.limit or (_MOST_OF_C4 if isinstance(corpus.documents, LazyDocuments) else None)
    return strided_windows(corpus.documents, seqlen=seqlen, stride=config.stride, limit=limit)


def scoring_settings(config: ScoringConfig, scored: "ScoredTargets | None", n_datasets: int = 1) -> dict[str, Any]:
    """Targets and log, as `simquant.evaluate` takes them.

    Raises
    ------
    UsageError
        If several data sets would share a log.
    """
    from simquant.evaluation.window_log import WindowLog

    if config.resume is not None and n_datasets > 1:
        raise UsageError(
            f"--resume {config.resume}: the log holds the windows of one text; evaluate one --dataset at a time"
        )
    return {"scored": scored, "log": None if config.resume is None else WindowLog(config.resume)}
