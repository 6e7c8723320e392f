"""What a forward pass gives is whole and finite before any of it is taken in."""

from collections.abc import Collection, Mapping
from typing import Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from artifacts.errors import NonFiniteError
from artifacts.sites import Site
from calib.solvers.threads import for_each

Vectors = Mapping[Site, Float[Tensor, "_ _"]]


def check_vectors(
    what: Literal["values", "gradients"], given: Vectors, wanted: Collection[Site], windows: Int64[Tensor, " tokens"]
) -> None:
    """Every site that is wanted, and no other, gave finite numbers.

    Parameters
    ----------
    what : {'values', 'gradients'}
        For the message.
    given : Mapping[Site, Float[Tensor, "tokens channels"]]
        What the sites gave.
    wanted : Collection[Site]
        The sites that have to give something.
    windows : Int64[Tensor, "tokens"]
        Number of each token's window in the run.

    Raises
    ------
    NonFiniteError
        With the site, the window and the count, if a number is not finite.
    ValueError
        If a site is missing or left over.
    """
    different = sorted(map(str, set(wanted) ^ set(given)))
    if different:
        raise ValueError(f"statistics: {what} missing or left over for {different}")
    for_each(lambda site: _check_finite(f"{site}: %d of {given[site].numel()} {what}", given[site], windows), given)


def _check_finite(label: str, x: Float[Tensor, "tokens channels"], windows: Int64[Tensor, " tokens"]) -> None:
    if torch.isfinite(x.sum()):  # a sum over NaN or infinity is neither, and costs a third of the whole mask
        return
    bad = ~torch.isfinite(x)
    if bad.any():
        first = int(windows[bad.any(dim=1).to(windows.device)][0])
        raise NonFiniteError(
            f"{label % int(bad.sum())} are NaN or infinite, first in window {first}. "
            "The model itself overflows there: try --dtype float32 or bfloat16, or other calibration text."
        )
