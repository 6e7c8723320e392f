"""Answers to the requests of lm-evaluation-harness, from the exact model or through a packed cache."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from artifacts.model.transformers_release import cache_argument, returned_cache
from kvgauge.terminal.console import UsageError
from simquant.tasks.generation import answer
from simquant.tasks.item import Item

_MAX_NEW_TOKENS = 256  # the harness's own default
_LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # its names, the first given counts


@final
@dataclass(frozen=True, kw_only=True)
class Respondent:
    """Answers the three kinds of requests, each on an empty cache of its own.

    Parameters
    ----------
    model : nn.Module
        A transformers causal language model, inside the context that `new_cache` came from.
    tokenizer : object
        Its transformers tokenizer.
    context_tokens : int
        What the model can read.
    new_cache : callable
        Makes an empty cache; None in its place is the model's own, which keeps everything exact.
    done : callable
        Sees each cache once its request is answered.
    """

    model: nn.Module
    tokenizer: Any
    context_tokens: int
    new_cache: Callable[[], Any] = lambda: None
    done: Callable[[Any], None] = lambda cache: None

    def loglikelihood(self, context: str, continuation: str) -> tuple[float, bool]:
        """Log probability of a continuation in nats, and whether it is what greedy decoding gives.

        The cache holds the context, all but its last token, before the continuation is read in one step. A context that
        is too long loses its start.

        Raises
        ------
        UsageError
            If the continuation has no token, or more than the model can read.
        """
        stripped = context.rstrip()  # a blank belongs to the word behind it, as tokenizers see it
        continuation = context[len(stripped) :] + continuation
        before = self._encode(stripped) if stripped else [self._prefix]
        whole = self._encode(stripped + continuation) if stripped else [*before, *self._encode(continuation, bare=True)]
        n_scored = len(whole) - len(before)
        if not 0 < n_scored <= self.context_tokens:
            raise UsageError(
                f"lm-eval: expected a continuation of 1 to {self.context_tokens} tokens; got {n_scored} for "
                f"{continuation!r:.80}. Stretch the context with --maxseqlen, or remove the task."
            )
        # One token more than the context holds: the last one is predicted, and never read.
        log_probs, greedy = self._score(whole[-self.context_tokens - 1 :], n_scored)
        return float(log_probs.sum()), greedy

    def loglikelihood_rolling(self, text: str) -> float:
        """Log probability of a whole text in nats.

        A text that is too long is read in windows, each on a cache of its own: every token is predicted once, the last
        ones from a full context.
        """
        ids = [self._prefix, *self._encode(text, bare=True)]
        n_tokens, total = len(ids) - 1, 0.0
        for start in range(0, n_tokens, self.context_tokens):
            # Scores ids[start + 1 : end + 1], each once; what is read reaches back as far as the context allows.
            end = min(start + self.context_tokens, n_tokens)
            log_probs, _ = self._score(ids[max(0, end - self.context_tokens) : end + 1], end - start)
            total += float(log_probs.sum())
        return total

    def generate_until(self, prompt: str, settings: Mapping[str, Any]) -> str:
        """Greedy answer to a prompt, up to the first stop string.

        A prompt that is too long loses its middle.

        Raises
        ------
        UsageError
            If the answer is to be sampled.
        """
        if settings.get("do_sample", settings.get("temperature")):
            raise UsageError(
                f"lm-eval: only greedy decoding is supported; the task samples, {dict(settings)}. Remove it."
            )
        stop = settings.get("until") or ()
        item = Item(
            task="lm-eval",
            id=f"{prompt!r:.40}",
            prompt=prompt,
            max_new_tokens=next((int(settings[name]) for name in _LIMITS if settings.get(name)), _MAX_NEW_TOKENS),
            stop=(stop,) if isinstance(stop, str) else tuple(stop),
            overlong="cut_middle",
        )
        cache = self.new_cache()
        text = answer(self.model, self.tokenizer, item, cache=cache).text
        self.done(cache)
        return text

    @property
    def _prefix(self) -> int:
        """Token before the first one of a text."""
        token = self.tokenizer.bos_token_id
        return int(self.tokenizer.eos_token_id if token is None else token)

    def _encode(self, text: str, *, bare: bool = False) -> list[int]:
        """Token ids, with the special tokens that the tokenizer adds by itself unless they shall be `bare`."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=not bare, verbose=False).input_ids
        return ids

    @torch.no_grad()
    def _score(self, ids: Sequence[int], n_scored: int) -> tuple[Float[Tensor, " scored"], bool]:
        """Log probabilities of the last tokens, and whether each is the likeliest.

        Two steps: by policy the first one may read exact keys and values, so that what is scored belongs in the second.
        """
        tokens = torch.tensor([list(ids)], device=next(self.model.parameters()).device)
        # The second step begins with the last token before the scored ones, whose logits predict the first of them.
        first = max(1, tokens.shape[1] - 1 - n_scored)
        cache = self.new_cache()
        argument = cache_argument(self.model, cache)
        output = self.model(input_ids=tokens[:, :first], use_cache=True, logits_to_keep=1, **argument)
        cache, logits = returned_cache(output), output.logits
        if first < tokens.shape[1] - 1:
            argument = cache_argument(self.model, cache)
            later = self.model(input_ids=tokens[:, first:-1], use_cache=True, **argument).logits
            logits = torch.cat([logits, later], dim=1)
        self.done(cache)
        log_probs, targets = logits[0, -n_scored:].float().log_softmax(dim=-1), tokens[0, -n_scored:]
        return log_probs.gather(-1, targets[:, None])[:, 0], bool((log_probs.argmax(dim=-1) == targets).all())
