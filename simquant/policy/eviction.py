"""Which tokens a cache drops for good: what stays of the prompt, and of the tokens decoded after it."""

from dataclasses import dataclass

PREFILL_METHODS = ("all", "snapkv", "pyramidkv", "h2o", "streaming_llm")
DECODING_METHODS = ("slide", "adaptive", "discontinuous", "h2o")

_PYRAMID_SLOPE = 20
"""The least budget that PyramidKV aims at is the mean one over this (its beta)."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Which held tokens may go after a step, how many of them stay, and by whose attention that is decided.

    Parameters
    ----------
    start, end : int
        The candidates, numbered among the tokens that are held.
    n_kept : int
        How many of them stay.
    n_queries : int or None
        The step's last queries that decide; 0 keeps the first candidates, None lets all queries decide.
    pooled : bool
        Whether a token's score is shared with its neighbours first.
    """

    start: int
    end: int
    n_kept: int
    n_queries: int | None
    pooled: bool = False


@dataclass(frozen=True, kw_only=True)
class Eviction:
    """How many tokens of each sequence and layer survive the prompt and each later step, and which.

    A token is dropped after the step that exceeds a budget has read it. Its score is the attention that the step's
    queries pay it, of the mean query head: all heads of a layer drop the same tokens, since the codes of a token's
    heads are one record (SnapKV and the others choose for each query head, and keep a copy of the keys for each).
    Tokens that share scales are scored together and dropped together, so that a budget is exceeded by less than a
    group. Tokens that the policy keeps exact are never dropped; they count towards the budgets. Positions stay those
    of the text. Layers with a sliding window are left alone: they forget by themselves.

    Parameters
    ----------
    prefill : {'all', 'snapkv', 'pyramidkv', 'h2o', 'streaming_llm'}
        What stays of the first step, if it has more than `prefill_tokens` tokens: all; those that its last queries
        read most; so, but up to twice as many in the first layers and fewer in the last; those that all queries that
        may see them read most; or the first ones.
    prefill_tokens, prefill_recent_tokens : int
        Tokens that stay of the prompt, and how many of them are its last, which also are the queries that decide;
        both from 1, the second below the first.
    pooling : {'avg', 'max'}
        How scores are shared among `kernel_tokens` neighbours, by SnapKV and PyramidKV.
    kernel_tokens : int
        An odd number from 1.
    decoding : {'slide', 'adaptive', 'discontinuous', 'h2o'} or None
        What stays of later tokens, once there are more than `decoding_tokens` of them beside what stayed of the prompt:
        the last ones and those that the step's own query reads most; so, with a width that grows from the recent
        tokens by one every `growth_steps` steps; so, but evicting only then; or those that the query reads most,
        whether of the prompt or not.
    decoding_tokens, decoding_recent_tokens : int
        Decoded tokens that stay, and how many of them are the last; both from 1, the second below the first.
    growth_steps : int
        Decoded tokens from one widening to the next, from 1.

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
            raise ValueError(f"Eviction: kernel_tokens must be odd; got {self.kernel_tokens}")
        _check_budget("prefill", self.prefill_tokens, self.prefill_recent_tokens)
        _check_budget("decoding", self.decoding_tokens, self.decoding_recent_tokens)

    def of_prompt(self, n_tokens: int, layer: int, n_layers: int) -> Choice | None:
        """What stays of a prompt in a layer; None where all of it does."""
        if self.prefill == "all" or n_tokens <= self.prefill_tokens:
            return None
        recent = self.prefill_recent_tokens
        older, n_kept = n_tokens - recent, self.prefill_tokens - recent
        if self.prefill == "pyramidkv":
            n_kept = _in_pyramid(n_kept, older, layer, n_layers)
        n_queries = {"h2o": None, "streaming_llm": 0}.get(self.prefill, recent)
        shared = self.prefill in ("snapkv", "pyramidkv")
        return Choice(start=0, end=older, n_kept=n_kept, n_queries=n_queries, pooled=shared)

    def of_decoded(self, n_held: int, n_prompt_kept: int, n_decoded: int, n_new: int) -> Choice | None:
        """What stays after `n_decoded` tokens that followed the prompt, the last `n_new` in this step; None: all."""
        width = self._width(n_decoded, n_new)
        if width is None or n_held <= n_prompt_kept + width:
            return None
        start = 0 if self.decoding == "h2o" else n_prompt_kept
        end = n_held - self.decoding_recent_tokens
        n_kept = n_prompt_kept - start + width - self.decoding_recent_tokens
        return Choice(start=start, end=end, n_kept=n_kept, n_queries=1)

    def describe(self) -> str:
        """One phrase for reports."""
        prompt = "" if self.prefill == "all" else f"{self.prefill_tokens} tokens of the prompt kept by {self.prefill}"
        later = "" if self.decoding is None else f"{self.decoding_tokens} decoded tokens kept by {self.decoding}"
        return ", ".join(part for part in (prompt, later) if part) or "no token evicted"

    def _width(self, n_decoded: int, n_new: int) -> int | None:
        """How many decoded tokens may stay after this step; None where it evicts nothing."""
        if self.decoding in (None, "slide", "h2o"):
            return None if self.decoding is None else self.decoding_tokens
        grown = n_decoded // self.growth_steps
        if self.decoding == "discontinuous" and grown == (n_decoded - n_new) // self.growth_steps:
            return None
        return min(self.decoding_tokens, self.decoding_recent_tokens + grown)


def _in_pyramid(mean: int, older: int, layer: int, n_layers: int) -> int:
    """Older tokens that a layer keeps: falling in equal steps, never more than there are, at least `mean` on average.

    As in the published code the last layer stands one step above the least budget.
    """
    largest = min(2 * mean - mean // _PYRAMID_SLOPE, older)
    least = 2 * mean - largest
    return largest - layer * ((largest - least) // n_layers)


def _check_name(name: str, value: object, known: tuple[object, ...]) -> None:
    if value not in known:
        raise ValueError(f"Eviction: {name} must be one of {', '.join(map(str, known))}; got {value!r:.60}")


def _check_count(name: str, value: object) -> None:
    if type(value) is not int or value < 1:
        raise ValueError(f"Eviction: {name} must be an integer from 1; got {value!r:.60}")


def _check_budget(phase: str, n_tokens: int, n_recent: int) -> None:
    _check_count(f"{phase}_tokens", n_tokens)
    _check_count(f"{phase}_recent_tokens", n_recent)
    if n_recent >= n_tokens:
        raise ValueError(
            f"Eviction: {phase}_recent_tokens must be below {phase}_tokens, of which they are a part; got {n_recent} "
            f"and {n_tokens}"
        )
