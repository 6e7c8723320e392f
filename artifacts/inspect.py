"""Summary and comparison of artifact files, without torch."""

from typing import Any

import numpy as np

from artifacts.errors import CorruptArtifactError
from artifacts.manifest import Manifest
from artifacts.sites import Site
from artifacts.spec import QuantSpec
from artifacts.storage import Array, Stored, canonical_json

_ABSENT = "nothing"


def report(stored: Stored) -> dict[str, Any]:
    """Provenance of an artifact and one entry per site, as JSON values.

    Raises
    ------
    CorruptArtifactError
        If the manifest is damaged, or the arrays do not fit its specifications.
    """
    manifest = Manifest.from_json(stored.header)
    sites = {str(site): _site(site, spec, manifest, stored) for site, spec in sorted(manifest.specs.items())}
    header = {name: value for name, value in manifest.to_json().items() if name not in ("specs", "fit_sources")}
    static_bytes = sum(site["static_bytes"] for site in sites.values())
    return {"digest": stored.digest, **header, "static_bytes": static_bytes, "sites": sites}


def table(found: dict[str, Any]) -> str:
    """The report as a text table."""
    corpus, model = found["corpus"], found["model"]
    model_name = (
        f"{found['model_id'] or 'a local folder'} ({model['model_type']}, {model['n_layers']} layers)"
        if model
        else "unknown"
    )
    windows = f"{corpus['n_windows']} windows of {corpus['seqlen']} tokens, seed {corpus['seed']}"
    if "start_token" in corpus:
        windows += f", each begun with the start token, {corpus['start_token']}"
    top = [
        f"recipe     {found['recipe'].get('name', '-')}: {found['recipe'].get('source', '')}",
        f"model      {model_name}",
        f"text       {corpus['name']}" + (f": {windows}" if corpus["n_windows"] else ""),
        f"sinks      first {found['sink_tokens']} tokens in full precision and left out of the fit{_choice(found)}",
        f"static     {found['static_bytes']:,} bytes, stored once for any number of tokens",
        f"written by kvgauge {found['tool_version']}, digest {found['digest'][:16]}",
        "",
        f"{'site':24} {'bits':>4} {'bytes':>8}  {'range':26} quantizer",
    ]
    rows = []
    for name, site in found["sites"].items():
        span = "{:.4g} .. {:.4g}".format(*site["range"]) if site["range"] else "not static"
        rows.append(f"{name:24} {site['bits']:>4.3g} {site['static_bytes']:>8}  {span:26} {site['quantizer']}")
        rows += [f"{'':40}{line}" for line in _level_lines(site)]
    sources = sorted({site["fitted_from"] for site in found["sites"].values()})
    return "\n".join([*top, *rows, "", "fitted from " + "; ".join(sources)])


def _choice(found: dict[str, Any]) -> str:
    """Reason for the number of sink tokens, if it was chosen."""
    return f"; auto: {found['sink_choice']['reason']}" if "sink_choice" in found else ""


def differences(one: Stored, other: Stored) -> list[str]:
    """Differences between two files: entries of the manifest, and arrays."""
    rows = _different_values("", one.header, other.header)
    for name in sorted({*one.arrays, *other.arrays}):
        a, b = one.arrays.get(name), other.arrays.get(name)
        if a is None or b is None:
            rows.append(f"{name}: only in the {'second' if a is None else 'first'}")
        elif a.shape != b.shape or a.dtype != b.dtype:
            rows.append(f"{name}: {a.dtype} {a.shape} and {b.dtype} {b.shape}")
        elif not np.array_equal(a, b):
            gap = np.abs(a.astype(np.float64) - b.astype(np.float64)).max()
            rows.append(f"{name}: {int((a != b).sum())} of {a.size} values differ, by at most {gap:.4g}")
    return rows


def _site(site: Site, spec: QuantSpec, manifest: Manifest, stored: Stored) -> dict[str, Any]:
    try:
        return _entry(site, spec, manifest, stored)
    except (ValueError, TypeError, IndexError, KeyError) as error:
        raise CorruptArtifactError(f"{site}: the arrays do not fit the specification ({error})") from error


def _entry(site: Site, spec: QuantSpec, manifest: Manifest, stored: Stored) -> dict[str, Any]:
    arrays = {n.partition("/")[2]: a for n, a in stored.arrays.items() if n.startswith(f"{site}/")}
    tensors = {name.rpartition(".")[2]: array for name, array in arrays.items()}
    tables = _tables(tensors)
    return {
        "quantizer": spec.describe(),
        "kind": spec.kind,
        "bits": spec.bits,
        "static_bytes": int(sum(array.nbytes for array in arrays.values())),
        "range": _range(tensors, tables, spec),
        "tables": len(tables),
        "levels": [round(float(level), 6) for level in tables[0]] if tables else [],
        "fitted_from": manifest.fit_sources.get(str(site), "unknown"),
    }


def _tables(tensors: dict[str, Array]) -> list[Array]:
    """Codebooks of a site, of equal or different lengths."""
    levels, lengths = tensors.get("levels"), tensors.get("n_levels")
    if levels is None:
        return []
    return list(levels) if lengths is None else np.split(levels, np.cumsum(lengths.astype(np.int64))[:-1])


def _range(tensors: dict[str, Array], tables: list[Array], spec: QuantSpec) -> list[float] | None:
    """Smallest and largest value that can be decoded, over all channels; None without static scales."""
    if "scale" not in tensors or not _in_units_of_x(spec):
        return None
    scale = tensors["scale"].astype(np.float64)
    if "offset" not in tensors:  # symmetric: one code less, zero in the middle
        largest = float((scale * (2 ** (spec.bits - 1) - 1)).max())
        return [-largest, largest]
    # Ends of the code range in units of the scale: first and last level of each table, or 0 and 2^bits - 1 of a uniform
    # quantizer; a table serves a run of neighbouring channels.
    offset = tensors["offset"].astype(np.float64)
    runs = len(scale) // max(1, len(tables))
    ends = [(float(table[0]), float(table[-1])) for table in tables] or [(0.0, 2.0**spec.bits - 1)] * len(scale)
    low, high = (np.repeat(end, runs if tables else 1) for end in np.transpose(ends))
    return [float((offset + scale * low).min()), float((offset + scale * high).max())]


def _in_units_of_x(spec: QuantSpec) -> bool:
    """True if the innermost scale is in units of x: a uniform quantizer or codebook without a transform around it."""
    if spec.inner is not None:
        return spec.kind.endswith("_sparse") and _in_units_of_x(spec.inner)
    return "bits" in spec.options


def _level_lines(site: dict[str, Any]) -> list[str]:
    if not site["levels"] or len(site["levels"]) > 16:
        return []
    which = "levels" if site["tables"] == 1 else f"levels of channel 0 of {site['tables']}"
    return [f"{which}: " + " ".join(f"{level:+.3f}" for level in site["levels"])]


def _different_values(name: str, one: Any, other: Any) -> list[str]:
    if isinstance(one, dict) and isinstance(other, dict):
        keys = sorted({*one, *other})
        return [
            row
            for key in keys
            for row in _different_values(
                f"{name}.{key}" if name else key, one.get(key, _ABSENT), other.get(key, _ABSENT)
            )
        ]
    texts = [value if value is _ABSENT else canonical_json(value) for value in (one, other)]
    return [] if texts[0] == texts[1] else [f"{name}: {texts[0][:80]} and {texts[1][:80]}"]
