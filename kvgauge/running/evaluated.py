"""Quantizers to evaluate: those of an artifact, or with dynamic scales by a recipe."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from kvgauge.configuration.evaluate import EvaluateConfig
from kvgauge.configuration.fields import flag, given
from kvgauge.configuration.protocol import protocol_settings
from kvgauge.configuration.recipe import RecipeConfig, foreign_hints, recipe_changes
from kvgauge.terminal.console import UsageError, listing_of_runs, say

if TYPE_CHECKING:
    from artifacts.artifact import Artifact
    from artifacts.quantizer import Quantizer
    from artifacts.sites import Site
    from calib.recipe.recipe import Recipe
    from kvgauge.loading.models import LoadedModel
    from simquant.protocols.protocol import ProtocolName

IMPORTED = "imported"
_RECIPE_FLAGS = ("recipe", "key_bits", "value_bits", "symmetric", "clamp", "stage")


@dataclass(frozen=True, kw_only=True)
class Evaluated:
    """Quantizers that fit a model, and which tokens go without.

    Parameters
    ----------
    quantizers : Artifact or mapping from Site to Quantizer
        Fitted, or with dynamic scales.
    sink_tokens : int
        First tokens that stay in full precision.
    cache : mapping or None
        What the recipe of dynamic scales says of other exact tokens; an artifact knows that itself.
    """

    quantizers: "Artifact | Mapping[Site, Quantizer]"
    sink_tokens: int
    cache: Mapping[str, Any] | None = None

    @property
    def artifact(self) -> "Artifact | None":
        """The quantizers, if they were fitted."""
        from artifacts.artifact import Artifact

        return self.quantizers if isinstance(self.quantizers, Artifact) else None

    def settings(self, config: EvaluateConfig, protocol: "ProtocolName | None" = None) -> dict[str, Any]:
        """Policy, protocol and chunking, as they were asked for; or under the protocol that is named."""
        own = config.protocol if protocol is None else replace(config.protocol, protocol=protocol)
        answering = bool(config.tasks.tasks)
        return protocol_settings(own, self.quantizers, self.sink_tokens, self.cache, answering=answering)


def fitted(
    loaded: "LoadedModel",
    artifact: "Artifact | None",
    recipe: "Recipe | None",
    sink_tokens: int | Literal["auto"] | None = None,
) -> Evaluated:
    """Quantizers for this model.

    Parameters
    ----------
    loaded : LoadedModel
        The model.
    artifact : Artifact or None
        Fitted quantizers; None is dynamic scales.
    recipe : Recipe or None
        Of either; None for an imported artifact.
    sink_tokens : int, 'auto' or None
        First tokens that stay in full precision; without a number as the artifact or the recipe says.

    Raises
    ------
    MismatchError
        If the artifact was made for another model.
    RecipeError
        If a recipe without an artifact needs calibration.
    """
    from calib.fitting.dynamic import dynamic, dynamic_sinks

    layers = loaded.layers()
    given = sink_tokens if isinstance(sink_tokens, int) else None
    if artifact is not None:
        artifact.check_model(loaded.fingerprint(layers))
        return Evaluated(quantizers=artifact, sink_tokens=artifact.manifest.sink_tokens if given is None else given)
    assert recipe is not None, "only an imported artifact goes without"
    quantizers = dynamic(loaded.model, recipe, layers=layers)
    cache = None if recipe.cache is None else recipe.cache.model_dump(mode="json")
    own = dynamic_sinks(recipe) if given is None else given
    return Evaluated(quantizers=quantizers, sink_tokens=own, cache=cache)


def load_artifact(path: Path | None, options: RecipeConfig) -> "Artifact | None":
    """The artifact, foreign or not; with what had to be assumed said.

    Raises
    ------
    UsageError
        If there is none, or flags that describe quantizers go with an imported file that holds them already.
    """
    from artifacts.importers import Hints, open_foreign

    if path is None:
        if not given(options, ("abits", "key_bits", "value_bits", "recipe")):
            raise UsageError(
                "nothing to evaluate: name an artifact with --quantizer-path FILE, or quantize without calibration "
                "with --abits N. " + listing_of_runs()
            )
        return None
    if not path.exists():
        raise UsageError(f"{path}: no such file. {listing_of_runs()}")
    hints = foreign_hints(options)
    opened = open_foreign(path, hints)
    for notice in opened.notices:
        say(f"note: {notice}")
    # Files of other tools hold fitted tables and no recipe: there is nothing that an option could change.
    if opened.artifact.manifest.recipe.get("name") == IMPORTED:
        flags = [flag(name) for name in _RECIPE_FLAGS if getattr(options, name) is not None]
        if flags or (hints != Hints() and not opened.notices):
            told = ", ".join(flags) or "the options that describe quantizers"
            raise UsageError(f"{path} comes from another tool and fixes its quantizers; remove {told}")
    return opened.artifact


def chosen_recipe(options: RecipeConfig, artifact: "Artifact | None", path: Path | None) -> "Recipe | None":
    """The recipe of the artifact, with which the flags must agree; or the one that dynamic scales follow.

    None for an imported artifact, which had none.

    Raises
    ------
    UsageError
        If flags ask for other quantizers than the artifact holds.
    """
    from calib.recipe.recipe import Recipe, load_recipe

    if artifact is None:
        recipe = load_recipe(options.recipe or "kvquant")
        return recipe.edited(recipe_changes(options, recipe.model_dump(mode="json")))
    if options.sink_tokens == "auto" and artifact.manifest.recipe.get("sink_tokens") != "auto":
        raise UsageError(
            f"{path}: --first-few-fp16 auto: calibration chooses, and this file was given "
            f"{artifact.manifest.sink_tokens} first tokens. Remove the option, give a number, or calibrate again"
        )
    if artifact.manifest.recipe.get("name") == IMPORTED:
        return None
    recipe = Recipe.parse(dict(artifact.manifest.recipe), str(path))
    base = recipe.model_dump(mode="json")
    asked = recipe.edited(recipe_changes(options, base)).model_dump(mode="json")
    rows = [row for name in ("stage", "key", "value") for row in _differences(name, base[name], asked[name])]
    if options.recipe and load_recipe(options.recipe).name != recipe.name:
        rows.append(f"recipe: the file has {recipe.name}, the command line {options.recipe}")
    if rows:
        raise UsageError(
            f"{path}: the options contradict the artifact:\n  "
            + "\n  ".join(rows)
            + "\nRemove the options, or calibrate again with them."
        )
    return recipe


def _differences(name: str, held: Any, asked: Any) -> list[str]:
    if isinstance(held, Mapping) and isinstance(asked, Mapping):
        keys = sorted({*held, *asked})
        return [row for key in keys for row in _differences(f"{name}.{key}", held.get(key), asked.get(key))]
    return [] if held == asked else [f"{name}: the file has {held}, the command line {asked}"]
