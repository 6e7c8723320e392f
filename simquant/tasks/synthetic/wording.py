"""Wording of prompts around a long text, plain and for a conversation."""

from simquant.tasks.options import TaskOptions

_SENTENCE = 32
"""Tokens that a sentence around an answer may take: a model in a conversation repeats the question in it."""


def worded(opening: str, text: str, question: str, beginning: str, options: TaskOptions) -> str:
    """Prompt with a text between instruction and question.

    A plain prompt leads up to the answer with its beginning. A turn of a conversation asks before the text, too: a
    small model that is asked behind it alone talks of something else.
    """
    if options.format == "chat":
        return f"{opening} {question}\n\n{text}\n\n{question}"
    return f"{opening}\n\n{text}\n\nQuestion: {question}\nAnswer: {beginning}"


def answer_limits(n_tokens: int, options: TaskOptions) -> tuple[int, tuple[str, ...]]:
    """Maximum number of tokens and stop strings of an answer of at most n tokens.

    A plain answer is the rest of a line. In a conversation the model ends its turn itself.
    """
    return (n_tokens + _SENTENCE, ()) if options.format == "chat" else (n_tokens, ("\n",))
