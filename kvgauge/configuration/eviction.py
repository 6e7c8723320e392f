"""The tokens that a cache drops, under the names of SCOPE and KIVI-SCOPE."""

from dataclasses import asdict, dataclass


@dataclass(frozen=True, kw_only=True)
class EvictionConfig:
    """A strategy and a budget for the prompt, and for what is decoded after it; None is SCOPE's default.

    Parameters
    ----------
    method : str or None
        ALLKV, SnapKV, PyramidKV, H2O or StreamingLLM.
    max_capacity_prompt, window_size, kernel_size : int or None
        Prompt tokens kept, the last of them that score the others, and neighbours that share scores.
    pooling : str or None
        avgpool or maxpool.
    decoding_metric : str or None
        slide, adaptive, discontinuous, h2o or None.
    decoding_window_size, decoding_recent_size, delta : int or None
        Decoded tokens kept, the last of them that always are, and tokens from one widening to the next.
    """

    method: str | None = None
    max_capacity_prompt: int | None = None
    window_size: int | None = None
    pooling: str | None = None
    kernel_size: int | None = None
    decoding_metric: str | None = None
    decoding_window_size: int | None = None
    decoding_recent_size: int | None = None
    delta: int | None = None

    @property
    def given(self) -> dict[str, str | int]:
        """The options that were given, by name."""
        return {name: value for name, value in asdict(self).items() if value is not None}
