"""Globs over the names of sites: attention module, layer, or site."""

from collections.abc import Iterable
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field
from wcmatch import fnmatch

from artifacts.errors import InvalidValueError
from artifacts.sites import Site
from calib.recipe.errors import RecipeError, nearest
from calib.statistics.site_shape import SiteShape

_FLAGS = fnmatch.BRACE | fnmatch.CASE


def _possible(pattern: str) -> str:
    try:
        fnmatch.translate(pattern, flags=_FLAGS)
    except Exception as error:  # wcmatch has no public class for it
        raise InvalidValueError(f"expected a glob such as layers.[0-3].key*; got {pattern!r:.80}: {error}") from error
    return pattern


def _as_tuple(given: Any) -> Any:
    return (given,) if isinstance(given, str) else tuple(given) if isinstance(given, list) else given


Pattern = Annotated[str, Field(min_length=1), AfterValidator(_possible)]
Patterns = Annotated[tuple[Pattern, ...], BeforeValidator(_as_tuple)]
"""Globs with `*`, `?`, `[0-9]` and `{a,b}`; a single one needs no list."""


def names(shape: SiteShape) -> list[str]:
    """Names of a site that a pattern can match.

    Examples
    --------
    >>> shape = SiteShape(site=Site(0, "value"), heads=2, head_dim=8, module="model.layers.0.self_attn")
    >>> names(shape)
    ['model.layers.0.self_attn', 'layers.0', 'layers.0.value']
    """
    return [*([shape.module] if shape.module else []), f"layers.{shape.site.layer}", str(shape.site)]


def matched(patterns: Iterable[str], shapes: Iterable[SiteShape], where: str) -> set[Site]:
    """Sites that match any of the patterns.

    Raises
    ------
    RecipeError
        If a pattern matches no site; lists some names.
    """
    known = {shape.site: names(shape) for shape in shapes}
    found: set[Site] = set()
    for pattern in patterns:
        sites = {site for site, its in known.items() if fnmatch.filter(its, pattern, flags=_FLAGS)}
        if not sites:
            there_are = [name for its in known.values() for name in its]
            raise RecipeError(
                f"{where}: no site matches {pattern!r}; names are such as {', '.join(there_are[:3])}."
                + nearest(pattern, there_are)
            )
        found |= sites
    return found
