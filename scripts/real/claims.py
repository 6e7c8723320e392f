"""What the documentation says of recipes on SmolLM2, as claims about what was measured."""

from calib.recipe.recipe import Recipe, chosen_recipe, load_recipe
from scripts.real.claim import Claim
from scripts.real.measurement import Measurement


def quick_recipes() -> dict[str, Recipe]:
    """The default recipe as it is, at 4.2 bits, and at three."""
    # Choosing how many first tokens stay exact is most of a fit: one recipe does it, the other has what it should find.
    return {
        "default": load_recipe("default"),
        "default-3": chosen_recipe("default", 3).edited({"sink_tokens": 1}),
    }


def all_recipes() -> dict[str, Recipe]:
    """All that claims are about."""
    keys = load_recipe("default").edited({"value": {"method": "identity"}})
    return {
        **quick_recipes(),
        "default-2": chosen_recipe("default", 2),
        **{name: load_recipe(name) for name in ("kvquant-4-1pct", "kvquant-3-1pct", "predictive")},
        **{f"keys-{sinks}": keys.edited({"sink_tokens": sinks}) for sinks in (0, 1)},
    }


def quick_claims(found: Measurement) -> list[Claim]:
    """Claims that short windows are enough for; none is of times, which another process beside CI would change."""
    return [sinks(found), lost(found, at_most=0.03), more_kl(found, "default-3", "default")]


def all_claims(found: Measurement) -> list[Claim]:
    """All claims."""
    default = found.results["default"]
    nats, error = default.loss_nats, default.loss_nats_stderr
    return [
        sinks(found),
        lost(found, at_most=0.012),
        Claim(what="default: loss, nats a token", measured=nats, stderr=error, at_most=0.010),
        Claim(what="default: counted bits", measured=default.bits["average"], at_most=4.2),
        more_kl(found, "default-3", "default"),
        more_kl(found, "default-2", "default-3"),
        more_kl(found, "kvquant-4-1pct", "default"),
        more_bits(found, "kvquant-4-1pct", "default"),
        more_kl(found, "kvquant-3-1pct", "default-3", at_least=3),
        more_bits(found, "kvquant-3-1pct", "default-3"),
        more_kl(found, "kvquant-3-1pct", "predictive"),
        more_bits(found, "kvquant-3-1pct", "predictive"),
        first_token(found),
        *times(found),
    ]


def sinks(found: Measurement) -> Claim:
    """The first token draws the attention of all others, and calibration finds that it pays to keep it exact."""
    kept = found.artifacts["default"].manifest.sink_tokens
    return Claim(what="default: first tokens kept exact", measured=kept, at_least=1)


def lost(found: Measurement, at_most: float) -> Claim:
    """KL at four bits is small."""
    default = found.results["default"]
    return Claim(
        what="default: KL, nats a token", measured=default.kl_mean, stderr=default.kl_mean_stderr, at_most=at_most
    )


def more_kl(found: Measurement, worse: str, better: str, at_least: float = 1) -> Claim:
    """One recipe diverges more than another one, by a factor, on the same windows."""
    ratio = found.results[worse].kl_mean / found.results[better].kl_mean
    return Claim(what=f"KL of {worse} / {better}", measured=ratio, at_least=at_least)


def more_bits(found: Measurement, worse: str, better: str) -> Claim:
    """One recipe stores more than another one."""
    ratio = found.results[worse].bits["average"] / found.results[better].bits["average"]
    return Claim(what=f"counted bits of {worse} / {better}", measured=ratio, at_least=1)


def first_token(found: Measurement) -> Claim:
    """The default recipe's keys, with values exact, lose most of what they lose in the first token."""
    ratio = found.results["keys-0"].kl_mean / found.results["keys-1"].kl_mean
    return Claim(what="keys of default: KL without / with one exact token", measured=ratio, at_least=2)


def times(found: Measurement) -> list[Claim]:
    """Neither calibration nor evaluation takes much longer than the passes that they need."""
    return [
        Claim(what="gathering / bare passes", measured=found.gather_ratio, at_most=2),
        Claim(what="evaluation / bare passes", measured=found.evaluate_ratio, at_most=2),
    ]
