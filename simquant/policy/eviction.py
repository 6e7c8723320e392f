"""Eviction: token budgets of the prompt and of the decoded tokens, after SnapKV, PyramidKV, H2O and SCOPE."""

from dataclasses import dataclass

from artifacts.errors import InvalidValueError

PREFILL_METHODS = ("all", "snapkv", "pyramidkv", "h2o", "streaming_llm")
DECODING_METHODS = ("slide", "adaptive", "discontinuous", "h2o")

_PYRAMID_SLOPE = 20
"""Beta of PyramidKV: the smallest budget, that of the last layer, aims at the mean budget divided by beta."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Candidates for eviction after one forward pass, the number to keep, and the observation window that scores them.

    Parameters
    ----------
    start, end : int
        Range of the candidates, counted among the tokens in the cache.
    n_kept : int
        Candidates to keep.
    n_queries : int or None
        Observation window: the last queries of the pass, whose attention is the score. 0 keeps the first candidates
        without a score; None takes all queries.
    pooled : bool
        Smooth the scores over neighbouring tokens first.
    """

    start: int
    end: int
    n_kept: int
    n_queries: int | None
    pooled: bool = False


@dataclass(frozen=True, kw_only=True)
class Eviction:
    """Token budgets per sequence and layer, and the rule that picks the tokens to evict.

    Eviction runs after the forward pass that exceeds a budget. The score of a token is the attention weight that the
    queries of the observation window give it, averaged over query heads. All heads of a layer evict the same tokens,
    since the codes of a token cover all heads; SnapKV and the others choose per query head, and keep a copy of the
    keys for each. Tokens that share scales get one score and are evicted together, so that a budget is exceeded by
    less than a group. Tokens that the policy keeps in full precision are never evicted, and count towards the
    budgets. Position ids stay those of the text. Layers with sliding-window attention are not touched.

    Parameters
    ----------
    prefill : {'all', 'snapkv', 'pyramidkv', 'h2o', 'streaming_llm'}
        Rule for prompts of more than `prefill_tokens` tokens. 'all': keep everything. 'snapkv': keep the tokens with
        the most attention from the observation window. 'pyramidkv': the same, with budgets that fall from up to twice
        the mean in the first layer. 'h2o': keep those with the most attention accumulated over all queries.
        'streaming_llm': keep the first and the last tokens.
    prefill_tokens, prefill_recent_tokens : int
        Prompt tokens to keep, and the observation window: the last tokens of the prompt, always kept, and used for
        scoring. Both from 1, the second below the first.
    pooling : {'avg', 'max'}
        Smoothing of the scores over `kernel_tokens` neighbours, by SnapKV and PyramidKV.
    kernel_tokens : int
        Width of the pooling kernel: an odd number from 1.
    decoding : {'slide', 'adaptive', 'discontinuous', 'h2o'} or None
        Rule for decoded tokens, once there are more than `decoding_tokens` of them in the cache. 'slide': keep the
        last ones and those with the most attention from the newest query. 'adaptive': the same, with a budget that
        grows from the recent tokens by one token every `growth_steps` steps. 'discontinuous': as 'adaptive', but
        evict at growth steps alone. 'h2o': one budget for prompt and decoded tokens, the most attended are kept.
    decoding_tokens, decoding_recent_tokens : int
        Decoded tokens to keep, and the most recent of them, always kept; both from 1, the second below the first.
    growth_steps : int
        Decoded tokens per token that the budget grows, from 1.

    References
    ----------
    SCOPE, section 4 (slide, adaptive, discontinuous): arXiv 2412.13649. SnapKV: 2404.14469. PyramidKV: 2406.02069.
    H2O: 2306.14048. StreamingLLM: 2309.17453.
    """

    prefill: str = "all"
    prefill_tokens: int = 2048
    prefill_recent_tokens: int = 32
    pooling: str = "avg"
    kernel_tokens: int = 5
    decoding: str | None = None
    decoding_tokens: int = 1024
    decoding_recent_tokens: int = 256
    growth_steps: int = 15

    def __post_init__(self) -> None:
        _check_name("prefill", self.prefill, PREFILL_METHODS)
        _check_name("pooling", self.pooling, ("avg", "max"))
        _check_name("decoding", self.decoding, (None, *DECODING_METHODS))
        for name in ("kernel_tokens", "growth_steps"):
            _check_count(name, getattr(self, name))
        if self.kernel_tokens % 2 == 0:
            raise InvalidValueError(f"Eviction: kernel_tokens must be odd; got {self.kernel_tokens}")
        _check_budget("prefill", self.prefill_tokens, self.prefill_recent_tokens)
        _check_budget("decoding", self.decoding_tokens, self.decoding_recent_tokens)

    def of_prompt(self, n_tokens: int, layer: int, n_layers: int) -> Choice | None:
        """Eviction from a prompt at one layer; None if all of it is kept."""
        if self.prefill == "all" or n_tokens <= self.prefill_tokens:
            return None
        recent = self.prefill_recent_tokens
        older, n_kept = n_tokens - recent, self.prefill_tokens - recent
        if self.prefill == "pyramidkv":
            n_kept = _in_pyramid(n_kept, older, layer, n_layers)
        # SnapKV scores by the last `recent` queries alone; H2O accumulates attention over all of them (2306.14048).
        n_queries = {"h2o": None, "streaming_llm": 0}.get(self.prefill, recent)
        shared = self.prefill in ("snapkv", "pyramidkv")
        return Choice(start=0, end=older, n_kept=n_kept, n_queries=n_queries, pooled=shared)

    def of_decoded(self, n_held: int, n_prompt_kept: int, n_decoded: int, n_new: int) -> Choice | None:
        """Eviction after `n_decoded` tokens that followed the prompt, the last `n_new` in this step; None: no token."""
        # SCOPE keeps the compressed prompt apart from decoded tokens: its budget counts the latter alone. H2O has one
        # budget of both, so that its candidates start at the first token of the prompt.
        width = self._width(n_decoded, n_new)
        if width is None or n_held <= n_prompt_kept + width:
            return None
        start = 0 if self.decoding == "h2o" else n_prompt_kept
        end = n_held - self.decoding_recent_tokens
        n_kept = n_prompt_kept - start + width - self.decoding_recent_tokens
        return Choice(start=start, end=end, n_kept=n_kept, n_queries=1)

    def describe(self) -> str:
        """Phrase for reports."""
        prompt = "" if self.prefill == "all" else f"{self.prefill_tokens} tokens of the prompt kept by {self.prefill}"
        later = "" if self.decoding is None else f"{self.decoding_tokens} decoded tokens kept by {self.decoding}"
        return ", ".join(part for part in (prompt, later) if part) or "no token evicted"

    def _width(self, n_decoded: int, n_new: int) -> int | None:
        """Budget of decoded tokens after this step; None if it evicts nothing."""
        if self.decoding in (None, "slide", "h2o"):
            return None if self.decoding is None else self.decoding_tokens
        # SCOPE: the budget starts at the recent tokens and grows by one every `growth_steps` tokens, up to
        # decoding_tokens; 'discontinuous' evicts only in a step that passes such a multiple (2412.13649, 4).
        grown = n_decoded // self.growth_steps
        if self.decoding == "discontinuous" and grown == (n_decoded - n_new) // self.growth_steps:
            return None
        return min(self.decoding_tokens, self.decoding_recent_tokens + grown)


def _in_pyramid(mean: int, older: int, layer: int, n_layers: int) -> int:
    """Budget of older tokens at a layer: falls linearly, at most `older`, at least `mean` on average."""
    # PyramidKV (2406.02069): budgets fall linearly from 2m - m / beta to m / beta, whose mean is m. Cut to the
    # `older` tokens that exist, with the smallest one raised to keep the mean. Dividing by n_layers, as the published
    # code does, leaves the last layer one difference above the smallest budget.
    largest = min(2 * mean - mean // _PYRAMID_SLOPE, older)
    least = 2 * mean - largest
    return largest - layer * ((largest - least) // n_layers)


def _check_name(name: str, value: object, known: tuple[object, ...]) -> None:
    if value not in known:
        raise InvalidValueError(f"Eviction: {name}: expected one of {', '.join(map(str, known))}; got {value!r:.60}")


def _check_count(name: str, value: object) -> None:
    if type(value) is not int or value < 1:
        raise InvalidValueError(f"Eviction: {name} must be an integer from 1; got {value!r:.60}")


def _check_budget(phase: str, n_tokens: int, n_recent: int) -> None:
    _check_count(f"{phase}_tokens", n_tokens)
    _check_count(f"{phase}_recent_tokens", n_recent)
    if n_recent >= n_tokens:
        raise InvalidValueError(
            f"Eviction: {phase}_recent_tokens must be below {phase}_tokens, of which they are a part; got {n_recent} "
            f"and {n_tokens}"
        )
