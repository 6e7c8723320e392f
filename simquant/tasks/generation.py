"""Greedy decoding of answers, with the model's own cache or a packed one."""

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
from simquant.tasks.prompt import prompt_ids


@final
@dataclass(frozen=True, kw_only=True)
class Answer:
    """Answer of a model.

    Parameters
    ----------
    text : str
        Text without special tokens, up to the stop string.
    tokens : tuple of int
        Generated tokens, the one that ended the answer included.
    n_prompt_tokens : int
        Number of tokens of the prompt.
    """

    text: str
    tokens: tuple[int, ...]
    n_prompt_tokens: int


def answer(
    model: nn.Module, tokenizer: Any, item: Item, *, cache: Any = None, chunking: Chunking | None = None
) -> Answer:
    """Answer of a model to an item by greedy decoding.

    Parameters
    ----------
    model : nn.Module
        A transformers causal language model, inside the context of `cache`.
    tokenizer : object
        A transformers tokenizer.
    item : Item
        Prompt, stop strings and maximum length of the answer.
    cache : object
        Empty cache; None is the model's own, in full precision.
    chunking : Chunking or None
        Chunked prefill of the prompt; None is one step.

    Raises
    ------
    TaskError
        If prompt and answer do not fit into the context, and the prompt may not be cut.
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
    """Tokens that a model adds to a prompt by greedy decoding, until `is_over(tokens)`."""
    device = next(model.parameters()).device
    ids = torch.tensor([list(prompt)], device=device)
    spans = [(0, len(prompt))] if chunking is None else chunking.spans(len(prompt))
    # The logits of all tokens of a long prompt would take more memory than the model.
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
    """Token ids of the prompt; if it is too long and may be cut, tokens are removed from its middle.

    Raises
    ------
    TaskError
        If the prompt is too long and may not be cut, or there is no chat template.
    """
    ids = prompt_ids(tokenizer, item.prompt, item.format)
    context_tokens = int(text_config(model).max_position_embeddings)
    room = context_tokens - item.max_new_tokens
    if len(ids) <= room:
        return ids
    if item.overlong == "refuse" or room < 2:
        raise TaskError(
            f"{item.task} {item.id}: expected a prompt of at most {room} tokens, which leaves {item.max_new_tokens} of "
            f"the context of {context_tokens} for the answer; got {len(ids)}. Use shorter prompts, or a longer context "
            "with --maxseqlen."
        )
    # LongBench truncates in the middle, since instructions are at both ends of its prompts (2308.14508).
    return [*ids[: room - room // 2], *ids[len(ids) - room // 2 :]]


def end_tokens(model: nn.Module, tokenizer: Any) -> set[int]:
    """End-of-sequence tokens of the model and of the tokenizer."""
    of_model = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    found = {*(of_model if isinstance(of_model, list | tuple) else [of_model]), tokenizer.eos_token_id}
    return {token for token in found if token is not None}


def before_stop(text: str, stop: Sequence[str]) -> str:
    """Text up to the first stop string."""
    return text[: min((text.find(end) for end in stop if end in text), default=len(text))]
