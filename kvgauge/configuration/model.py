"""The model of a run."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

DEMO = "demo"
"""Name of the bundled model, and of the text that it was made for."""

Dtype = Literal["auto", "float64", "float32", "bfloat16", "float16"]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A model, and how it is loaded.

    Parameters
    ----------
    model : str or None
        Folder, GGUF file, hub id, `demo` or another known name; None where none was named.
    device : str or None
        As torch names it, or 'auto' for accelerate's device map; None is CUDA where there is one.
    dtype : {'auto', 'float64', 'float32', 'bfloat16', 'float16'}
        Of the weights; 'auto' is as stored.
    maxseqlen : int or None
        Context to stretch RoPE to; None is the model's own.
    """

    model: str | None = None
    device: str | None = None
    dtype: str = "auto"
    maxseqlen: int | None = None

    @property
    def name(self) -> str:
        """The model that is named; without a name the bundled one."""
        return self.model or DEMO


def short_name(model: str) -> str:
    """A model's name for a folder.

    Examples
    --------
    >>> short_name("path/to/model/"), short_name("owner/name:model-Q8_0.gguf")
    ('model', 'name-model-Q8_0')
    """
    return Path(model.rstrip("/")).name.removesuffix(".gguf").replace(":", "-") or "model"
