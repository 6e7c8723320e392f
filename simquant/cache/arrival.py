"""What a step brings to a layer of a packed cache besides its keys and values."""

from dataclasses import dataclass

from jaxtyping import Bool
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Arrival:
    """What a layer has to know of a step besides what `update` gets.

    Parameters
    ----------
    key : Tensor or None
        The keys before rotation; None where the keys that `update` gets are stored.
    real : Tensor or None
        Which tokens are no padding; None if all are.
    """

    key: Tensor | None
    real: Bool[Tensor, "batch tokens"] | None
