"""Running evaluation of one set of quantizers: scores and counts, batch by batch."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from jaxtyping import Int64
from torch import Tensor, nn

from artifacts.artifact import Artifact
from artifacts.errors import KVGaugeError
from artifacts.model.attention import AttentionLayer
from artifacts.model.evidence import text_config
from artifacts.quantizer import Quantizer
from artifacts.sites import Site
from simquant.evaluation.batch_scores import BatchScores
from simquant.evaluation.costs import Costs
from simquant.evaluation.figures import Normalization, figures
from simquant.evaluation.report import protocol_line, stored_bits, worse_than_guessing
from simquant.evaluation.result import EvalResult
from simquant.evaluation.scored_targets import ScoredTargets
from simquant.evaluation.scoring import ScoredLogits, Scores, check_logits, score, window_logits
from simquant.protocols.protocol import Protocol
from simquant.usage import Usage


class NothingQuantizedError(KVGaugeError, ValueError):
    """Comparison in which no token is quantized, or no scored target reads a quantized one."""


@dataclass
class EvaluationRun:
    """Quantizers and a protocol, with their scores and counts so far.

    Parameters
    ----------
    quantizers : Artifact or mapping from Site to Quantizer
        See `simulate`.
    protocol : Protocol
        Protocol of the quantized logits.
    """

    quantizers: Artifact | Mapping[Site, Quantizer]
    protocol: Protocol
    _usage: Usage = field(init=False)
    _scores: list[Scores] = field(default_factory=list, init=False)
    _seconds: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        self._usage = Usage(self.quantizers)

    def check(self, layers: Sequence[AttentionLayer], n_tokens: int, n_scored: int) -> None:
        """Check that in windows of `n_tokens` some scored target reads codes of each layer.

        Parameters
        ----------
        layers : Sequence[AttentionLayer]
            Layers of the model; a sliding window may lie wholly in tokens of full precision.
        n_tokens, n_scored : int
            Tokens of each window, and the most targets scored in one.

        Raises
        ------
        NothingQuantizedError
            If quantizers of a layer have fewer than 16 bits and no scored target reads their codes.
        """
        # A layer passes if its keys or its values are read quantized. Sites of equal tensor and sliding window share
        # the answer, which is computed once for each pair.
        windows = {layer.layer: layer.sliding_window for layer in layers}
        reads = {
            (tensor, window): self.protocol.reads_codes(tensor, n_tokens, n_scored=n_scored, sliding_window=window)
            for tensor, window in {(site.tensor, windows[site.layer]) for site in self._lossy}
        }
        read = {site.layer for site in self._lossy if reads[site.tensor, windows[site.layer]]}
        unread = sorted({site.layer for site in self._lossy} - read)
        if unread:
            raise self._refusal(n_tokens, {layer: windows[layer] for layer in unread if windows[layer] is not None})

    def score(
        self,
        model: nn.Module,
        layers: Sequence[AttentionLayer],
        batch: Int64[Tensor, "windows tokens"],
        fp: ScoredLogits,
    ) -> BatchScores:
        """Scores of the quantized model for a batch with full-precision logits `fp`."""
        start = time.perf_counter()
        on_device = batch.to(next(model.parameters()).device)
        quantized, usage = self.protocol.run(model, on_device, self.quantizers, layers, logits=window_logits)
        scores = tuple(score(fp, ScoredLogits.of(quantized, batch, fp.n_scored)))
        return BatchScores(scores, usage, time.perf_counter() - start)

    def add(self, batch: BatchScores) -> None:
        """Adds a batch.

        Raises
        ------
        NonFiniteError
            If the full-precision or the quantized model gives NaN.
        NothingQuantizedError
            If a quantizer has fewer than 16 bits and no token has been encoded so far.
        """
        for window, scores in enumerate(batch.scores, start=len(self._scores)):
            check_logits("full-precision", window, scores.fp_nll)
            check_logits("quantized", window, scores.nll)
        self._usage.include(batch.usage)
        self._scores.extend(batch.scores)
        self._seconds += batch.seconds
        if self._lossy and self._usage.quantized_fraction == 0:
            raise self._refusal(max(len(scores.nll) for scores in batch.scores) + 1)

    def result(
        self, model: nn.Module, windows: Tensor, scored: ScoredTargets, normalization: Normalization
    ) -> EvalResult:
        """Result over all batches."""
        clusters = scored.clusters(self._scores, windows.shape[1])
        found = figures(clusters, normalization)
        return EvalResult(
            **found,
            bits=stored_bits(self._usage, self.protocol.policy),
            costs=Costs.of(model, self.quantizers, self._usage.average_bits),
            quantized_fraction=self._usage.quantized_fraction,
            protocol=protocol_line(self.quantizers, self.protocol, windows, scored, normalization),
            n_targets=sum(len(scores.nll) for scores in clusters),
            n_windows=len(windows),
            seconds=self._seconds,
            cluster_nats=tuple(float(scores.loss.sum()) for scores in clusters),
            cluster_targets=tuple(len(scores.loss) for scores in clusters),
            warnings=worse_than_guessing(found["fp_perplexity"], text_config(model).vocab_size),
        )

    @property
    def _lossy(self) -> list[Site]:
        return [site for site, quantizer in self.quantizers.items() if quantizer.spec.bits < 16]

    def _refusal(self, n_tokens: int, sliding: Mapping[int, int | None] | None = None) -> NothingQuantizedError:
        policy = self.protocol.policy
        where = "".join(
            f", layer {layer} sees {window} tokens back" for layer, window in list((sliding or {}).items())[:3]
        )
        return NothingQuantizedError(
            "evaluate: fewer than 16 bits were asked for and no token was quantized that a scored target reads "
            f"({policy.describe()}, windows of {n_tokens} tokens{where}; {self.protocol.chunking.describe()}, "
            f"{policy.describe_prefill()}). Use longer windows, a shorter prefill, or keep fewer tokens in full "
            "precision."
        )
