"""What `notebooks/predictive_coding.ipynb` measures and draws."""

import math

import pytest
import torch
from matplotlib.figure import Figure
from torch import Tensor

from artifacts.quantizers.identity import Identity
from artifacts.quantizers.mixed_codebook import MixedCodebook
from artifacts.quantizers.predicted import Predicted
from artifacts.sites import Site
from scripts.notebook.coding import (
    component_variances,
    explained_variance,
    least_bits,
    plot_level_bits,
    predictions,
)

KEY0, VALUE0 = Site(0, "key", "pre_rope"), Site(0, "value")
CHANNELS = 8


def correlated(tokens: int = 64) -> Tensor:
    return torch.randn(tokens, CHANNELS) @ torch.randn(CHANNELS, CHANNELS)


def copied(site: Site) -> Predicted:
    """Predicts a site to be what another one is."""
    return Predicted(
        channels=CHANNELS,
        inner=Identity(channels=CHANNELS),
        source_sites=str(site),
        weight=torch.eye(CHANNELS).half(),
        bias=torch.zeros(CHANNELS),
    )


def test_sites_are_predicted_from_what_their_sources_are_decoded_to() -> None:
    vectors = {KEY0: correlated(), VALUE0: correlated()}
    found = predictions({VALUE0: copied(KEY0), KEY0: Identity(channels=CHANNELS)}, vectors)
    assert list(found) == [VALUE0]
    torch.testing.assert_close(found[VALUE0], vectors[KEY0])
    assert explained_variance(vectors[KEY0], found[VALUE0]) == pytest.approx(1, abs=1e-6)


def test_a_basis_keeps_the_sum_of_variances_and_a_wider_one_spreads_them_more() -> None:
    x = correlated()
    variances = [component_variances(x, width) for width in (1, CHANNELS // 2, CHANNELS)]
    total = x.double().var(dim=0, correction=0).sum()
    for own in variances:
        assert own.sum() == pytest.approx(float(total))
        assert (own.diff() <= 0).all()
    bits = [least_bits(own, 0.1 * float(total)) for own in variances]
    assert bits[0] > bits[1] > bits[2] > 0


@pytest.mark.parametrize("share", [0.01, 0.3, 0.9])
def test_components_that_vary_alike_need_half_the_logarithm_of_the_ratio(share: float) -> None:
    variances = torch.full((5,), 3.0, dtype=torch.float64)
    assert least_bits(variances, share * 15) == pytest.approx(-math.log2(share) / 2)


def test_fewer_bits_are_needed_for_a_larger_error_and_none_for_the_variance_itself() -> None:
    variances = component_variances(correlated(), CHANNELS)
    bits = [least_bits(variances, share * float(variances.sum())) for share in (0.01, 0.1, 0.5, 1.0, 2.0)]
    assert bits == sorted(bits, reverse=True)
    assert bits[-2:] == pytest.approx([0, 0], abs=1e-9)


def test_the_picture_of_levels_has_the_bits_of_the_quantizers() -> None:
    counts = torch.tensor([1, 4, 2, 1, 8, 1, 2, 1], dtype=torch.int16)
    levels = torch.cat([torch.linspace(-1, 1, int(n)) for n in counts]).half()
    ones, zeros = torch.ones(CHANNELS), torch.zeros(CHANNELS)
    codebook = MixedCodebook(channels=CHANNELS, bits=7 / 8, scale=ones, offset=zeros, n_levels=counts, levels=levels)
    axes = Figure().subplots()
    plot_level_bits({"wrapped": copied(KEY0).replace(inner=codebook)}, axes)
    assert list(axes.lines[0].get_ydata()) == [3, 2, 1, 1, 0, 0, 0, 0]
