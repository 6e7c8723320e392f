"""Windows that an artifact was calibrated on, where they are at hand."""

from pathlib import Path
from typing import TYPE_CHECKING

from kvgauge.configuration.model import DEMO
from kvgauge.configuration.text import TextConfig

if TYPE_CHECKING:
    from jaxtyping import Int64
    from torch import Tensor

    from artifacts.artifact import Artifact
    from kvgauge.loading.models import LoadedModel

_WINDOWS = 8
"""Enough to tell a share of a thousandth from ten times as much; they are drawn at random, so any are as good."""


def calibration_windows(
    text: TextConfig, loaded: "LoadedModel", artifact: "Artifact"
) -> "Int64[Tensor, 'windows tokens'] | None":
    """Some of the very windows, if their text is bundled or being evaluated; None otherwise.

    Parameters
    ----------
    text : TextConfig
        What is being evaluated.
    loaded : LoadedModel
        The model, for its tokenizer.
    artifact : Artifact
        What was calibrated; its manifest says on what, and proves it.
    """
    from artifacts.storage import Stored
    from calib.text.corpus import CorpusError
    from calib.text.hub_datasets import SELF
    from calib.text.sketches import window_digests
    from calib.text.windows import sample_windows

    corpus = artifact.manifest.corpus
    source = next((name for name in (DEMO, *text.datasets) if Path(name).name == corpus.name), None)
    if source in (None, SELF) or corpus.seed is None or not corpus.n_windows:  # a model would write them once more
        return None
    try:
        words = loaded.corpus(source, "calibration", text.field)
        windows = sample_windows(
            words,
            n_windows=corpus.n_windows,
            seqlen=corpus.seqlen,
            seed=corpus.seed,
            start_token=corpus.start_token,
        )
    except (CorpusError, OSError, ValueError):  # another text under the same name
        return None
    # The name of a file is a hint; equal digests of the windows prove that it is the very text of the calibration.
    digest = Stored(format="windows", header={"windows": sorted(window_digests(windows))}, arrays={}).digest
    return windows[:_WINDOWS] if digest == corpus.digest else None
