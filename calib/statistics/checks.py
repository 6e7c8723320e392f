"""Validation of captured vectors before any of them enters the statistics."""

from collections.abc import Collection, Mapping
from typing import Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from artifacts.errors import InvalidValueError, NonFiniteError
from artifacts.sites import Site
from calib.solvers.threads import for_each

Vectors = Mapping[Site, Float[Tensor, "_ _"]]


def check_vectors(
    what: Literal["values", "gradients"], given: Vectors, wanted: Collection[Site], windows: Int64[Tensor, " tokens"]
) -> None:
    """Checks that exactly the wanted sites have vectors, all finite.

    Parameters
    ----------
    what : {'values', 'gradients'}
        Kind of the vectors, for messages.
    given : Mapping[Site, Float[Tensor, "tokens channels"]]
        Captured vectors.
    wanted : Collection[Site]
        Sites that must have vectors.
    windows : Int64[Tensor, "tokens"]
        Number of each token's window in the run.

    Raises
    ------
    NonFiniteError
        For NaN or infinity; names site, window and count.
    ValueError
        If a site is missing or not wanted.
    """
    different = sorted(map(str, set(wanted) ^ set(given)))
    if different:
        raise InvalidValueError(
            f"statistics: expected {what} of exactly the sites they are of; got others: {different}"
        )
    for_each(lambda site: _check_finite(f"{site}: %d of {given[site].numel()} {what}", given[site], windows), given)


def _check_finite(label: str, x: Float[Tensor, "tokens channels"], windows: Int64[Tensor, " tokens"]) -> None:
    if torch.isfinite(x.sum()):  # a sum with NaN or infinity is not finite; it costs a third of the mask
        return
    bad = ~torch.isfinite(x)
    if bad.any():
        first = int(windows[bad.any(dim=1).to(windows.device)][0])
        raise NonFiniteError(
            f"{label % int(bad.sum())} are NaN or infinite, first in window {first}. "
            "The model overflows there: use --dtype float32 or bfloat16, or another calibration text."
        )
