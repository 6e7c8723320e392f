"""Greedy answers, from the exact model or through a packed cache."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import nn

from artifacts.model.evidence import text_config
from artifacts.model.transformers_release import cache_argument, returned_cache
from simquant.protocols.chunking import Chunking
from simquant.tasks.errors import TaskError
from simquant.tasks.item import Item


@final
@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a model said.

    Parameters
    ----------
    text : str
        Without special tokens, up to the stop string.
    tokens : tuple of int
        All of them, up to the one that ended the answer.
    n_prompt_tokens : int
        What was read before.
    """

    text: str
    tokens: tuple[int, ...]
    n_prompt_tokens: int


def answer(
    model: nn.Module, tokenizer: Any, item: Item, *, cache: Any = None, chunking: Chunking | None = None
) -> Answer:
    """The likeliest token after the prompt, then after that, and so on.

    Parameters
    ----------
    model : nn.Module
        A transformers causal language model, inside the context that `cache` came from.
    tokenizer : object
        A transformers tokenizer.
    item : Item
        Prompt, stop strings and longest answer.
    cache : object
        An empty cache; None is the model's own, which keeps everything exact.
    chunking : Chunking or None
        How the prompt enters the cache; None is all at once.

    Raises
    ------
    TaskError
        If the prompt does not fit into the context together with the answer, and may not be cut.
    """
    prompt = prompt_tokens(model, tokenizer, item)

    def ended(tokens: Sequence[int]) -> bool:
        text = tokenizer.decode(tokens, skip_special_tokens=True) if item.stop else ""
        return tokens[-1] in last or any(stop in text for stop in item.stop)

    last = end_tokens(model, tokenizer)
    found = continue_greedily(
        model, prompt, cache=cache, chunking=chunking, max_new_tokens=item.max_new_tokens, is_over=ended
    )
    text = before_stop(tokenizer.decode(found, skip_special_tokens=True), item.stop)
    return Answer(text=text, tokens=tuple(found), n_prompt_tokens=len(prompt))


@torch.no_grad()
def continue_greedily(
    model: nn.Module,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    is_over: Callable[[Sequence[int]], bool],
    cache: Any = None,
    chunking: Chunking | None = None,
) -> list[int]:
    """The tokens that a model adds to a prompt, until `is_over` says so of them."""
    device = next(model.parameters()).device
    ids = torch.tensor([list(prompt)], device=device)
    spans = [(0, len(prompt))] if chunking is None else chunking.spans(len(prompt))
    # Of a long prompt the logits of all tokens would take more memory than the model.
    last_only = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    for start, end in spans:
        output = model(input_ids=ids[:, start:end], use_cache=True, **cache_argument(model, cache), **last_only)
        cache = returned_cache(output)
    found = [int(output.logits[0, -1].argmax())]
    while len(found) < max_new_tokens and not is_over(found):
        output = model(input_ids=ids.new_tensor([[found[-1]]]), use_cache=True, **cache_argument(model, cache))
        found.append(int(output.logits[0, -1].argmax()))
    return found


def prompt_tokens(model: nn.Module, tokenizer: Any, item: Item) -> list[int]:
    """The prompt as the model reads it; where it is too long and may be cut, its first and its last half.

    Raises
    ------
    TaskError
        If it is too long and may not be cut.
    """
    ids: list[int] = tokenizer(item.prompt, verbose=False).input_ids
    context_tokens = int(text_config(model).max_position_embeddings)
    room = context_tokens - item.max_new_tokens
    if len(ids) <= room:
        return ids
    if item.overlong == "refuse" or room < 2:
        raise TaskError(
            f"{item.task} {item.id}: expected at most {room} tokens, which leaves {item.max_new_tokens} of the context "
            f"of {context_tokens} for the answer; got {len(ids)}. Use shorter prompts, or a longer context with "
            "--maxseqlen."
        )
    return [*ids[: room - room // 2], *ids[len(ids) - room // 2 :]]


def end_tokens(model: nn.Module, tokenizer: Any) -> set[int]:
    """The tokens after which a model has nothing more to say."""
    of_model = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    found = {*(of_model if isinstance(of_model, list | tuple) else [of_model]), tokenizer.eos_token_id}
    return {token for token in found if token is not None}


def before_stop(text: str, stop: Sequence[str]) -> str:
    """The text up to the first of the stop strings."""
    return text[: min((text.find(end) for end in stop if end in text), default=len(text))]
