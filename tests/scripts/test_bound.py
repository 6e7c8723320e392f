"""Limits agree with closed forms and stand below every scalar code; recipes are measured as they decode."""

import json
import math
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from helpers.sites import everywhere, identity, per_channel
from torch import Tensor

from artifacts.errors import InvalidValueError
from artifacts.sites import Site
from calib import fit, load_recipe
from calib.fitting.chain import Chain
from calib.statistics.model_statistics import ModelStatistics
from calib.statistics.origin import Origin
from calib.statistics.site_shape import SiteShape
from calib.statistics.site_statistics import FIRST_POSITIONS
from calib.statistics.token_batch import TokenBatch
from scripts.bound import __main__ as program
from scripts.bound.coded import coded
from scripts.bound.limits import LIMITS, SiteLimits, site_limits, weighted_spectrum
from scripts.bound.rate_distortion import least_distortion
from scripts.bound.row import Row, limit_row, table
from scripts.results.kinds import KINDS

HEADS, HEAD_DIM, NOISE = 2, 8, 0.1
KEY, VALUE = Site(1, "key", "pre_rope"), Site(1, "value")
RATES = (0.0, 0.3, 1.0, 2.0, 4.0)


def doubles(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


# --- reverse water-filling


@pytest.mark.parametrize("bits", RATES)
def test_a_white_source_has_shannons_distortion(bits: float) -> None:
    assert least_distortion(doubles(*7 * [0.3]), bits) == pytest.approx(7 * 0.3 * 2 ** (-2 * bits), rel=1e-12)


@pytest.mark.parametrize("bits", [0.0, 0.5, 0.9, 1.1, 2.0, 5.0])
def test_two_components_share_the_rate_once_the_smaller_one_is_worth_it(bits: float) -> None:
    """With variances 16 and 1 that is from one bit each: both bits then have brought 16 down to 1."""
    alone, both = 1 + 16 * 2 ** (-4 * bits), 2 * math.sqrt(16) * 2 ** (-2 * bits)
    assert least_distortion(doubles(1, 16), bits) == pytest.approx(alone if bits < 1 else both, rel=1e-12)


def test_no_other_division_of_the_rate_does_better() -> None:
    variances, bits = torch.rand(6, dtype=torch.float64).pow(4), 1.3
    shares = torch.distributions.Dirichlet(torch.full((6,), 0.7)).sample((10_000,)).double()
    others = (variances * torch.exp2(-2 * 6 * bits * shares)).sum(dim=1)
    least = least_distortion(variances, bits)
    assert least <= others.min() < 2 * least


def test_distortion_falls_from_all_variance_on_and_components_without_variance_take_no_rate() -> None:
    variances = doubles(3, 0, 0.2, 1e-9)
    found = [least_distortion(variances, bits) for bits in torch.linspace(0, 9, 50).tolist()]
    assert found[0] == pytest.approx(float(variances.sum()), rel=1e-12)
    assert all(later < earlier for earlier, later in pairwise(found))
    assert least_distortion(doubles(4, 0), 1.0) == pytest.approx(4 * 2**-4)
    assert least_distortion(doubles(0, 0), 1.0) == 0


@pytest.mark.parametrize(("variances", "bits"), [((1.0, 2.0), -0.1), ((1.0, -1e-3), 1.0)])
def test_what_is_no_rate_or_no_variance_is_refused(variances: tuple[float, ...], bits: float) -> None:
    with pytest.raises(InvalidValueError, match="must not be negative"):
        least_distortion(doubles(*variances), bits)


@pytest.mark.parametrize(("bits", "scalar"), [(1, 0.3634), (2, 0.1175), (3, 0.03454), (4, 0.009497), (5, 0.002499)])
def test_the_best_scalar_code_stands_above_the_limit_and_nears_435_decibels(bits: int, scalar: float) -> None:
    """Distortions of a normal variable by J. Max, IRE Trans. Information Theory, 1960, table I."""
    gap = 10 * math.log10(scalar / least_distortion(doubles(1), bits))
    assert 1.6 < gap < 10 * math.log10(math.sqrt(3) * math.pi / 2)
    assert bits < 5 or gap > 4


# --- limits of sites


def gaussian(seed: int, n_tokens: int = 4096) -> ModelStatistics:
    """Two layers whose second is the first, moved and mixed, with a little white noise."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    fixed = torch.Generator().manual_seed(99)
    mixed = [torch.randn(16, 16, generator=fixed) * torch.logspace(0.5, -1, 16) for _ in range(3)]
    first = [normal(n_tokens, 16) @ mix + 3 for mix in mixed]
    second = [x @ mixed[0] / 4 - 1 + NOISE * normal(n_tokens, 16) for x in first]
    sites = [Site(n, *place) for n in range(2) for place in (("key", "pre_rope"), ("value",), ("query", "pre_rope"))]
    shapes = [SiteShape(site=site, heads=HEADS, head_dim=HEAD_DIM) for site in sites]
    found = ModelStatistics(shapes, "full", Origin(model={}, model_id=None, corpus="", seed=0, tool_version=""))
    positions, windows = torch.arange(n_tokens) % 512, torch.arange(n_tokens) // 512
    digests = [f"{seed * 1000 + n:032x}" for n in range(n_tokens // 512)]
    found.update(TokenBatch(positions, windows, digests), dict(zip(sites, [*first, *second], strict=True)))
    return found


@pytest.fixture(scope="module")
def chain() -> Chain:
    """Of a text to measure on."""
    return Chain(gaussian(seed=1), FIRST_POSITIONS)


@pytest.fixture(scope="module")
def limits(chain: Chain) -> Mapping[Site, SiteLimits]:
    return {site: site_limits(chain, site) for site in chain.statistics.sites if site.tensor != "query"}


def test_coding_more_together_never_costs(limits: Mapping[Site, SiteLimits]) -> None:
    for own in limits.values():
        for bits in RATES:
            head, layer, predicted = (own.decibels(limit, bits) for limit in LIMITS)
            assert head + 1e-9 >= layer >= predicted - 1e-9
        assert own.decibels("head", 0) == pytest.approx(0, abs=1e-9)
        assert own.decibels("head", 2) > own.decibels("layer", 2) + 0.1
    first = limits[Site(0, "key", "pre_rope")]
    assert first.decibels("predicted", 2) == pytest.approx(first.decibels("layer", 2))


def test_prediction_leaves_the_noise(limits: Mapping[Site, SiteLimits]) -> None:
    """Values are weighted alike, and 16 channels of noise are left of them; 48 inputs hide a hundredth of it."""
    own = limits[VALUE]
    expected = 10 * math.log10(16 * NOISE**2 * 2**-4 / own.energy)
    assert own.decibels("predicted", 2) == pytest.approx(expected, abs=0.15)


def test_weighted_eigenvalues_are_those_of_the_product() -> None:
    roots = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    roots[1, 0, :, 0] = 0  # a metric may be singular
    covariance, metric = roots @ roots.mT
    found = weighted_spectrum(covariance, metric)
    expected = torch.linalg.eigvals(metric @ covariance).real.flatten()
    assert torch.allclose(found.sort().values, expected.sort().values, rtol=1e-6, atol=1e-9)


def test_a_text_of_one_vector_has_no_limits() -> None:
    statistics = gaussian(seed=1, n_tokens=1024)
    statistics.sites[KEY].layer_moments.products.zero_()
    statistics.sites[KEY].layer_moments.sums.zero_()
    with pytest.raises(InvalidValueError, match=r"layers\.1\.key\.pre_rope: expected vectors that differ"):
        site_limits(Chain(statistics, FIRST_POSITIONS), KEY)


# --- recipes


def test_recipes_stand_above_the_limits_of_what_they_use(chain: Chain, limits: Mapping[Site, SiteLimits]) -> None:
    """Fitted to another sample of the same source, which is Gaussian, so that no code can pass below a limit."""
    fitted = gaussian(seed=0)
    rows = {}
    for name in ("default", "eigen", "predictive"):
        recipe = load_recipe(name).edited({"sink_tokens": 0})
        rows[name] = Row.of(name, coded(chain, fit(fitted, recipe), limits), limits)
    for tensor in ("key", "value"):
        assert rows["default"].above["head"][tensor] > 1
        assert rows["eigen"].above["head"][tensor] > 1
        assert rows["predictive"].above["predicted"][tensor] > 1
        # Half of the sites are predicted from what is decoded before them.
        gained = rows["eigen"].decibels[tensor] - rows["predictive"].decibels[tensor]
        assert gained + 6.02 * (rows["eigen"].bits[tensor] - rows["predictive"].bits[tensor]) > 3
    assert rows["predictive"].bits["key"] == pytest.approx(2, abs=0.1)


def test_an_ideal_coder_stands_on_its_own_limit(limits: Mapping[Site, SiteLimits]) -> None:
    row = limit_row("layer", 2.0, limits)
    assert row.above["layer"] == {"key": 0, "value": 0}
    assert row.above["head"]["key"] < 0 < row.above["predicted"]["key"]
    assert row.bits == {"key": 2, "value": 2}
    assert "| limit: layer, 2 bits | 2.00 / 2.00 |" in table([row])


def test_what_a_sample_of_tokens_cannot_tell_is_refused(chain: Chain, limits: Mapping[Site, SiteLimits]) -> None:
    with pytest.raises(InvalidValueError, match=r"layers\.0\.key\.pre_rope: .*neighbouring tokens"):
        coded(chain, everywhere(per_channel), limits)
    with pytest.raises(InvalidValueError, match=r"layers\.0\.key\.pre_rope: it is kept exact"):
        coded(chain, everywhere(identity), limits)


# --- the program

TINY = ["--seqlen", "128", "--nsamples", "4", "--limit", "4", "--recipes", "eigen"]


def test_the_program_takes_the_bundled_model_and_writes_what_it_prints(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "found.json"
    assert program.main([*TINY, "--bits", "2.5", "--json", str(path)]) == 0
    printed = capsys.readouterr().out.splitlines()[2:]
    found = KINDS["limits"].read(json.loads(path.read_text()), "")
    assert list(found) == ["limit: head, 2.5 bits", "limit: layer, 2.5 bits", "limit: predicted, 2.5 bits", "eigen"]
    for line, (name, figures) in zip(printed, found.items(), strict=True):
        cells = [name, *(column.cell(figures) for column in KINDS["limits"].columns)]
        assert [cell.strip() for cell in line.strip("| ").split(" | ")] == cells
    assert found["eigen"]["bits"]["key"] == pytest.approx(2.5, abs=0.1)  # type: ignore[index,call-overload]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--recipes", "kivi-2"], "kivi-2 codes keys after RoPE"),
        (["--recipes", "default,default"], "default is there twice"),
    ],
)
def test_recipes_that_cannot_be_compared_are_refused_at_once(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert program.main(options) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("bits", ["", "two", "2,,3", "-1", "2,17", "nan"])
def test_rates_are_numbers_of_bits(bits: str) -> None:
    with pytest.raises(SystemExit):
        program.parser().parse_args(["--bits", bits])
