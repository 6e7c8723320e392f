"""First tokens that stay exact: chosen where keys are far away, by errors and bits that a few plain lines find too."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from artifacts.artifact import Artifact
from artifacts.manifest import SinkChoice
from artifacts.sites import Site
from calib.calibration import gather
from calib.fitting.dynamic import dynamic
from calib.fitting.fit import fit
from calib.recipe.recipe import Recipe, load_recipe
from calib.statistics.model_statistics import ModelStatistics
from calib.statistics.origin import Origin
from calib.statistics.row_sample import RowSample
from calib.statistics.site_shape import SiteShape
from calib.statistics.site_statistics import Tier
from calib.statistics.token_batch import TokenBatch

pytestmark = pytest.mark.shapes

KEY, VALUE, QUERY = Site(0, "key", "post_rope"), Site(0, "value"), Site(0, "query", "post_rope")
HEADS, DIM, N_WINDOWS, N_TOKENS = 2, 8, 12, 60


def vectors(far: int) -> dict[Site, Tensor]:
    """Tokens of all windows; keys of the first `far` positions are far away from the others, their values small."""
    generator = torch.Generator().manual_seed(0)
    found = {
        site: torch.randn(N_WINDOWS, N_TOKENS, width, generator=generator)
        for site, width in ((KEY, HEADS * DIM), (VALUE, HEADS * DIM), (QUERY, 2 * HEADS * DIM))
    }
    found[KEY][:, :far] += 40 * torch.randn(HEADS * DIM, generator=generator).sign()
    found[VALUE][:, :far] *= 0.01
    return found


def statistics(far: int, n_tokens: int = N_TOKENS, first_rows: int | None = None, **model: Any) -> ModelStatistics:
    origin = Origin(model=model, model_id=None, corpus="made up", seed=0, tool_version="0")
    shapes = [SiteShape(site=site, heads=heads, head_dim=DIM) for site, heads in ((KEY, 2), (VALUE, 2), (QUERY, 4))]
    found = ModelStatistics(shapes, "basic", origin)
    if first_rows is not None:
        found.first = RowSample(first_rows)
    places, windows = torch.arange(n_tokens).repeat(N_WINDOWS), torch.arange(N_WINDOWS).repeat_interleave(n_tokens)
    batch = TokenBatch(places, windows, [f"{number:x}" for number in range(N_WINDOWS)])
    found.update(batch, {site: x[:, :n_tokens].flatten(0, 1) for site, x in vectors(far).items()})
    return found


def recipe(name: str = "default", **changes: Any) -> Recipe:
    return load_recipe(name).edited({"stage": "post_rope", "sink_tokens": "auto", **changes})


def cheapest(choice: SinkChoice) -> int:
    costs = [b + math.log2(d) / 2 for d, b in zip(choice.errors, choice.bits, strict=True)]
    return min(range(len(costs)), key=lambda n: (costs[n], n))


def assert_same_quantizers(one: Artifact, other: Artifact) -> None:
    assert dict(one.manifest.specs) == dict(other.manifest.specs)
    for site in one:
        for name, tensor in one[site].tensors().items():
            assert torch.equal(tensor, other[site].tensors()[name])


@pytest.mark.parametrize(
    ("name", "far"), [*(("default", far) for far in (0, 1, 3, 8)), ("eigen", 0), ("eigen", 3), ("kvquant-3", 1)]
)
def test_tokens_whose_keys_are_far_away_stay_exact(name: str, far: int) -> None:
    artifact = fit(statistics(far), recipe(name))
    assert artifact.manifest.sink_tokens == far
    assert artifact.manifest.sink_choice.reason.startswith(f"{far} of at most 8: ")
    given = fit(statistics(far), recipe(name, sink_tokens=far))
    assert given.manifest.sink_choice is None
    assert_same_quantizers(artifact, given)


def test_a_number_is_not_chosen() -> None:
    for number in (0, 2):
        found = fit(statistics(3), recipe(sink_tokens=number)).manifest
        assert found.sink_tokens == number
        assert "sink_choice" not in found.to_json()


@pytest.mark.parametrize("far", [0, 2])
def test_the_figures_are_those_of_a_few_plain_lines(far: int) -> None:
    found = fit(statistics(far), recipe()).manifest
    quantizers, x = fit(statistics(far), recipe(sink_tokens=8)), vectors(far)
    q = x[QUERY][:, 8:].reshape(-1, HEADS, 2, DIM).double()
    metric = torch.einsum("thgi,thgj->hij", q, q) / (2 * len(q))
    keys = x[KEY].view(N_WINDOWS, N_TOKENS, HEADS, 1, DIM).double()
    logits = torch.einsum("nhgd,wthxd->nwthg", q, keys) / DIM**0.5
    attention = (logits.mean(dim=0) + logits.var(dim=0, correction=0) / 2).exp()
    attention = attention / attention[:, 8:].mean(dim=(0, 1))
    weights = (1024 / (1 + 1024 / attention)).mean(dim=3)
    errors, n_bits = torch.zeros(N_TOKENS).double(), []
    for site, quantizer in quantizers.items():
        rows = x[site].reshape(-1, HEADS * DIM)
        error = (rows - quantizer.simulate(rows)).view(N_WINDOWS, N_TOKENS, HEADS, DIM).double()
        spread = (x[site] - x[site][:, 8:].mean(dim=(0, 1))).view_as(error).double()
        forms = metric if site == KEY else torch.eye(DIM).double().expand(HEADS, -1, -1)
        error, spread = (
            (weights * torch.einsum("wthi,hij,wthj->wth", each, forms, each)).sum(dim=2) for each in (error, spread)
        )
        errors += error.mean(dim=0) / spread[:, 8:].mean() / 2
        n_bits.append(8 * quantizer.encode(rows[:64].half()).nbytes / 64 / rows.shape[1])
    b = sum(n_bits) / 2
    expected = [(errors[n:8].sum() + 2040 * errors[8:].mean()) / 2048 for n in range(9)]
    assert found.sink_choice.errors == pytest.approx([float(d) for d in expected], rel=1e-4)
    assert found.sink_choice.bits == pytest.approx([((2048 - n) * b + 16 * n) / 2048 for n in range(9)], rel=1e-4)
    assert found.sink_tokens == cheapest(found.sink_choice) == far


def test_a_sliding_window_has_room_for_all_that_are_chosen() -> None:
    found = fit(statistics(8, sliding_window=[None, 5, 16]), recipe()).manifest
    assert found.sink_tokens == 4
    assert found.sink_choice.reason.startswith("4 of at most 4: ")
    assert len(found.sink_choice.errors) == 5
    assert fit(statistics(8, sliding_window=[1]), recipe()).manifest.sink_tokens == 0


def test_windows_without_later_tokens_tell_nothing() -> None:
    short = statistics(1, n_tokens=8)
    found = fit(short, recipe())
    assert (found.manifest.sink_tokens, found.manifest.sink_choice.errors) == (0, [])
    assert "no window has tokens after the first 8" in found.manifest.sink_choice.reason
    assert_same_quantizers(found, fit(short, recipe(sink_tokens=0)))


def test_a_position_that_was_not_sampled_counts_as_a_later_one() -> None:
    found = fit(statistics(3, first_rows=2), recipe()).manifest
    assert found.sink_tokens == 2
    errors = torch.tensor(found.sink_choice.errors).double()
    steps = (errors[2:-1] - errors[3:]) / errors[-1]
    assert steps.tolist() == pytest.approx([1 / 2048] * 6, rel=0.05)


def test_exact_values_have_no_error_to_cut() -> None:
    found = fit(statistics(1), recipe(), bits=16).manifest
    assert (found.sink_tokens, set(found.sink_choice.errors), set(found.sink_choice.bits)) == (0, {0.0}, {16.0})
    assert found.sink_choice.reason == "0 of at most 8: there is no error to cut"


def test_scales_that_tokens_share_need_a_number() -> None:
    with pytest.raises(ValueError, match=r"kivi-2: layers\.0\.key\.post_rope: sink_tokens: auto .* give a number"):
        fit(statistics(1), recipe("kivi-2"))
    given = recipe("kivi-2", value={"group_size": 16}, sink_tokens=1)
    assert fit(statistics(1), given).manifest.sink_tokens == 1


def test_without_calibration_a_number_is_needed(tiny_llama: LlamaForCausalLM) -> None:
    with pytest.raises(ValueError, match=r"recipe kvquant without calibration: sink_tokens: auto is chosen from"):
        dynamic(tiny_llama, load_recipe("kvquant").edited({"sink_tokens": "auto"}))


@pytest.mark.parametrize(
    ("name", "target_bits", "tier"),
    [("eigen", 2.0, "basic"), ("predictive", None, "full"), ("predictive", 2.0, "full")],
)
def test_chains_and_budgets_are_fitted_as_with_the_number(
    tiny_llama: LlamaForCausalLM, name: str, target_bits: float | None, tier: Tier
) -> None:
    with torch.no_grad():
        tiny_llama.model.embed_tokens.weight[63] *= -20
    windows = torch.randint(0, 63, (6, 40))
    windows[:, 0] = 63
    chosen = load_recipe(name).edited({"target_bits": target_bits})
    gathered = gather(tiny_llama, windows, chosen, tier=tier)
    found = fit(gathered, chosen)
    number = found.manifest.sink_tokens
    assert found.manifest.recipe["sink_tokens"] == "auto"
    assert_same_quantizers(found, fit(gathered, chosen.edited({"sink_tokens": number})))
    assert number == cheapest(found.manifest.sink_choice)
