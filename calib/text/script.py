"""What stands between the parts of a text that a model writes: document ends, or a chat template's headers."""

from dataclasses import dataclass
from typing import Any

from artifacts.model.evidence import text_config
from calib.text.errors import CorpusError

_MARKS = ("first-question", "first-answer", "second-question")
"""Words that no template has, in the place of messages."""


@dataclass(frozen=True, kw_only=True)
class Script:
    """Tokens that a model does not write itself.

    Parameters
    ----------
    opening : tuple of int
        Tokens that every text begins with.
    turns : tuple of tuple of int
        Tokens that close a part and open the next one: of documents one kind, of conversations two that take turns.
    ends : frozenset of int
        Tokens by which the model ends a part.
    """

    opening: tuple[int, ...]
    turns: tuple[tuple[int, ...], ...]
    ends: frozenset[int]

    @classmethod
    def of(cls, tokenizer: Any, model: Any) -> "Script":
        """Conversations where the tokenizer has a chat template, else documents.

        Parameters
        ----------
        tokenizer : object or None
            Tokenizer of transformers.
        model : PreTrainedModel
            Its configuration names the start and end tokens that the tokenizer leaves out.

        Raises
        ------
        CorpusError
            If there is no token to begin with, or the template cannot be taken apart.
        """
        starts, ends = (_named(tokenizer, model, name) for name in ("bos_token_id", "eos_token_id"))
        if getattr(tokenizer, "chat_template", None):
            return cls._of_chat(tokenizer, frozenset(ends))
        return cls._of_documents(starts[:1], ends)

    @classmethod
    def _of_documents(cls, start: tuple[int, ...], ends: tuple[int, ...]) -> "Script":
        """Documents that begin with the start token; where there is none, with the end token of the one before."""
        end = ends[:1]
        if not start and not end:
            raise CorpusError(
                "self: the model needs a token to begin with; its tokenizer and configuration name neither a start "
                "token (bos_token) nor an end token (eos_token); name one in config.json, or pass a text"
            )
        turn = end if start == end else end + start
        return cls(opening=start or end, turns=(turn,) if end else (), ends=frozenset(ends))

    @classmethod
    def _of_chat(cls, tokenizer: Any, ends: frozenset[int]) -> "Script":
        """Questions and answers in turn: the template's parts around messages (Magpie, arXiv:2406.08464, sec. 2)."""
        opening, *turns = (
            tuple(tokenizer(part, add_special_tokens=False).input_ids) for part in _template_parts(tokenizer)
        )
        special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
        # A special token cannot stand within a message, so that the first of a header ends it.
        return cls(opening=opening, turns=tuple(turns), ends=ends | {turn[0] for turn in turns if turn[0] in special})


def _template_parts(tokenizer: Any) -> list[str]:
    """What a template writes before a question, between question and answer, and between answer and question.

    Raises
    ------
    CorpusError
        If it leaves messages out, or writes nothing between them.
    """
    roles = ("user", "assistant", "user")
    messages = [{"role": role, "content": mark} for role, mark in zip(roles, _MARKS, strict=True)]
    try:
        text, parts = tokenizer.apply_chat_template(messages, tokenize=False), []
        for mark in _MARKS:
            part, found, text = text.partition(mark)
            parts.append(part if found else "")
    except Exception as error:  # templates are programs of their authors and raise whatever they like
        raise CorpusError(f"self: the chat template refuses a conversation: {error}; pass a text") from error
    if not all(parts):
        raise CorpusError("self: the chat template leaves out messages, or what stands between them; pass a text")
    return parts


def _named(tokenizer: Any, model: Any, name: str) -> tuple[int, ...]:
    """Tokens of a name in the tokenizer and the model's configurations, which name one, several or none."""
    sources = (tokenizer, getattr(model, "generation_config", None), text_config(model))
    named = (getattr(source, name, None) for source in sources)
    lists = (found if isinstance(found, list | tuple) else [found] for found in named)
    return tuple(dict.fromkeys(token for tokens in lists for token in tokens if token is not None))
