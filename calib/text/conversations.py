"""Conversations in records: messages with roles, in the two spellings that data sets use."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from calib.text.errors import CorpusError

Message = dict[str, str]
"""A `role` and its `content`."""

ChatTemplate = Callable[[Sequence[Message]], Sequence[int]]
"""Messages to token ids, special tokens included."""

FIELDS = ("messages", "conversations")
"""Fields and columns that hold conversations, looked at where there is no text under the name of `--field`."""

_SPEAKERS = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant"}
"""Roles as ShareGPT and its kin spell them."""


@dataclass(frozen=True)
class Conversation:
    """Messages of one record.

    Parameters
    ----------
    where : str
        File and line, for messages of errors.
    messages : tuple of Message
        As chat templates take them.
    """

    where: str
    messages: tuple[Message, ...]

    def tokens(self, template: ChatTemplate | None) -> Sequence[int]:
        """Token ids as the model reads a conversation.

        Raises
        ------
        CorpusError
            If there is no template, or it refuses the conversation.
        """
        if template is None:
            raise CorpusError(
                f"{self.where}: a conversation needs a tokenizer with a chat template; this one has none; add "
                "chat_template.jinja to the model's folder, or write the conversation as text into the field `text`"
            )
        try:
            return template(self.messages)
        except Exception as error:  # templates are programs of their authors and raise whatever they like
            cause = " ".join(f"{error}".split())[:200]
            raise CorpusError(
                f"{self.where}: the tokenizer's chat template refuses the conversation: {cause}; correct or remove it"
            ) from error


def is_conversation(found: Any) -> bool:
    """True for a list of objects."""
    return isinstance(found, list) and bool(found) and isinstance(found[0], dict)


def conversation(found: Any, where: str) -> Conversation:
    """The conversation in a field: a list of `role` and `content`, or of ShareGPT's `from` and `value`.

    Raises
    ------
    CorpusError
        Names the first message that is none.
    """
    if not isinstance(found, list) or not found:
        raise CorpusError(f"{where}: expected a list of messages; got {found!r:.100}; correct or remove it")
    return Conversation(where, tuple(_message(entry, f"{where}, message {n}") for n, entry in enumerate(found, 1)))


def _message(entry: Any, where: str) -> Message:
    fields = entry if isinstance(entry, dict) else {}
    role = fields.get("role", fields.get("from"))
    content = fields.get("content", fields.get("value"))
    if not isinstance(role, str) or not isinstance(content, str):
        raise CorpusError(
            f"{where}: expected `role` and `content`, or `from` and `value`, both text; got {entry!r:.100}; correct "
            "or remove the conversation"
        )
    return {"role": _SPEAKERS.get(role, role), "content": content}
