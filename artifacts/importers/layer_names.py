"""Selection of the text decoder's layers among the module names of a foreign file."""

import re
from collections.abc import Iterable

from artifacts.errors import CorruptArtifactError
from artifacts.sites import Site, Stage

_NAME = re.compile(r"((?:.*\.)?)(\d{1,6})\.(?:.*\.)?([kv])_proj")
_OTHER_SENSES = re.compile(r"vision|visual|image|vit|audio|speech|whisper", re.IGNORECASE)


def text_sites(names: Iterable[str], stage: Stage) -> tuple[dict[Site, str], list[str]]:
    """Name of each site's projection, and notices of the names that were left out.

    Names with the same prefix before the layer number form a stack. With several stacks, those named after vision or
    audio are left out.

    Parameters
    ----------
    names : iterable of str
        Names of projections, such as `model.layers.3.self_attn.k_proj`.
    stage : {'pre_rope', 'post_rope'}
        Stage of the file's keys.

    Raises
    ------
    CorruptArtifactError
        If a name is no projection of a layer, if several stacks could be the text decoder, or if two names of a stack
        belong to one site.
    """
    stacks: dict[str, list[tuple[Site, str]]] = {}
    for name in names:
        match = _NAME.fullmatch(name)
        if match is None:
            raise CorruptArtifactError(f"expected names such as model.layers.0.self_attn.k_proj; got {name!r:.80}")
        stack, layer, tensor = match.groups()
        site = Site(int(layer), "key", stage) if tensor == "k" else Site(int(layer), "value")
        stacks.setdefault(stack, []).append((site, name))
    # The name of a single stack does not matter: a text model may have such a word in its name.
    chosen = [stack for stack in stacks if not _OTHER_SENSES.search(stack)] if len(stacks) > 1 else list(stacks)
    if len(chosen) > 1 or (stacks and not chosen):
        firsts = " and ".join(rows[0][1] for rows in stacks.values())
        raise CorruptArtifactError(f"expected the layers of one text decoder; got {firsts}. Remove the others")
    found: dict[Site, str] = {}
    for site, name in (row for stack in chosen for row in stacks[stack]):
        if site in found:
            raise CorruptArtifactError(f"{site}: expected one name for it; got {found[site]} and {name}")
        found[site] = name
    return found, [
        f"{len(rows)} entries such as {rows[0][1]} were left out: {chosen[0]}N is assumed to be the text decoder"
        for stack, rows in stacks.items()
        if stack not in chosen
    ]
