"""Prompts as a model reads them."""

from typing import Any

from simquant.tasks.errors import TaskError
from simquant.tasks.item import Format


def prompt_text(tokenizer: Any, prompt: str, format: Format) -> str:
    """Text that is tokenized: a plain prompt itself, or the chat template with it as the user's turn.

    The template's text ends where the answer of the model begins.

    Raises
    ------
    TaskError
        If the tokenizer has no chat template, or the template fails.
    """
    if format == "plain":
        return prompt
    if not getattr(tokenizer, "chat_template", None):
        raise TaskError(
            "--task-format chat: expected a tokenizer with a chat template; got one without. Add chat_template.jinja "
            "to the model's folder, or use --task-format plain."
        )
    turn = [{"role": "user", "content": prompt}]
    try:
        text: str = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # templates are programs of their authors and raise whatever they like
        raise TaskError(
            f"--task-format chat: expected a chat template that takes a single user turn; got {error}. Correct "
            "chat_template.jinja, or use --task-format plain."
        ) from error
    return text


def prompt_ids(tokenizer: Any, prompt: str, format: Format) -> list[int]:
    """Token ids of a prompt, special tokens included.

    Raises
    ------
    TaskError
        See `prompt_text`.
    """
    # A template writes the special tokens itself; the tokenizer would add a second start token.
    own = {} if format == "plain" else {"add_special_tokens": False}
    ids: list[int] = tokenizer(prompt_text(tokenizer, prompt, format), verbose=False, **own).input_ids
    return ids
