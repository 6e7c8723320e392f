"""The text of a run."""

from dataclasses import dataclass, replace

from kvgauge.configuration.model import DEMO, ModelConfig

_WIKITEXT = "wikitext2"


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """A text, and how it is cut into windows.

    Parameters
    ----------
    dataset : str or None
        A name or a file; several to evaluate, with commas between; None where none was named.
    field : str
        Field or column that holds the text of a record.
    seqlen : int or None
        Tokens of a window; None is 2048 or the model's context, whichever is smaller.
    bos : bool
        Every window begins with the tokenizer's start token.
    seed : int
        Draws the windows for calibration.
    """

    dataset: str | None = None
    field: str = "text"
    seqlen: int | None = None
    bos: bool = False
    seed: int = 0

    def beside(self, model: ModelConfig) -> "TextConfig":
        """The same with the demo text where none is named and the model is the bundled one."""
        return replace(self, dataset=DEMO) if not self.dataset and model.name == DEMO else self

    @property
    def source(self) -> str:
        """The dataset as it was typed; wikitext2 where none is named."""
        return self.dataset or _WIKITEXT

    @property
    def datasets(self) -> tuple[str, ...]:
        """The names or files one by one."""
        return tuple(name for name in self.source.split(",") if name) or (self.source,)
