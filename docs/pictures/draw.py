"""Draws the pictures of the documentation as SVG: `python docs/pictures/draw.py` writes them beside this file."""

from pathlib import Path

INK, PAPER = "#1f2937", "#ffffff"
EXACT, CODES, UNSEEN, ROOM, FILE = "#fcd34d", "#93c5fd", "#f3f4f6", "#e0e7ff", "#dcfce7"


def text(x: float, y: float, words: str, size: int = 13, anchor: str = "middle", weight: str = "normal") -> str:
    """A line of text."""
    return f'<text x="{x}" y="{y}" font-size="{size}" text-anchor="{anchor}" font-weight="{weight}">{words}</text>'


def box(x: float, y: float, width: float, height: float, title: str, *lines: str, fill: str = ROOM) -> str:
    """A rounded box: a bold title, lines below it."""
    middle = x + width / 2
    first = y + height / 2 - 8 * len(lines) + 5
    rows = [text(middle, first, title, 14, weight="bold")]
    rows += [text(middle, first + 17 * (i + 1), line, 12) for i, line in enumerate(lines)]
    shape = f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="8" fill="{fill}" stroke="{INK}"/>'
    return shape + "".join(rows)


def arrow(x1: float, y1: float, x2: float, y2: float, words: str = "") -> str:
    """A straight arrow, its label above the middle or, for a vertical one, to the right."""
    line = f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" stroke="{INK}" marker-end="url(#head)"/>'
    if not words:
        return line
    if x1 == x2:
        return line + text(x1 + 8, (y1 + y2) / 2 + 4, words, 12, "start")
    return line + text((x1 + x2) / 2, (y1 + y2) / 2 - 6, words, 12)


def save(name: str, width: int, height: int, *parts: str) -> None:
    """Writes one picture."""
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" fill="{INK}">'
        f'<defs><marker id="head" markerWidth="8" markerHeight="8" refX="7" refY="4" orient="auto">'
        f'<path d="M0,0 L8,4 L0,8 z" fill="{INK}"/></marker></defs>'
        f'<rect width="{width}" height="{height}" fill="{PAPER}"/>'
    )
    Path(__file__).with_name(f"{name}.svg").write_text("\n".join([head, *parts, "</svg>\n"]), encoding="utf-8")


def seen(left: float, top: float, sinks: int, recent: int, n: int = 9, side: int = 22) -> str:
    """The tokens that each query reads: a row for each query, a column for each cached token."""
    cells = []
    for query in range(n):
        for token in range(n):
            exact = token < sinks or query - token < recent
            fill = UNSEEN if token > query else EXACT if exact else CODES
            x, y = left + token * side, top + query * side
            cells.append(f'<rect x="{x}" y="{y}" width="{side - 2}" height="{side - 2}" fill="{fill}"/>')
    return "".join(cells)


def protocols() -> None:
    """Tokens that a query reads under full, decode and cache."""
    parts = []
    for left, title, how, sinks, recent in (
        (50, "full", "one pass; every token is codes", 0, 0),
        (310, "decode", "one pass; what a cache would hold", 1, 3),
        (570, "cache", "step by step; what the cache holds", 1, 3),
    ):
        parts += [text(left + 98, 26, title, 16, weight="bold"), text(left + 98, 46, how, 12)]
        parts.append(seen(left, 60, sinks, recent))
    for row in range(9):  # the steps of the third
        parts.append(arrow(774, 60 + 22 * row + 10, 790, 60 + 22 * row + 10))
        parts.append(text(796, 60 + 22 * row + 14, f"step {row + 1}", 10, "start"))
    parts.append(f'<g transform="rotate(-90 38 160)">{text(38, 160, "query", 12)}</g>')
    parts.append(text(148, 276, "cached token", 12))
    for x, fill, words in (
        (180, EXACT, "in full precision"),
        (330, CODES, "read from its codes"),
        (520, UNSEEN, "not seen"),
    ):
        parts.append(f'<rect x="{x}" y="290" width="18" height="18" fill="{fill}" stroke="{INK}"/>')
        parts.append(text(x + 26, 304, words, 12, "start"))
    save("protocols", 850, 320, *parts)


def rooms() -> None:
    """The packages and what lies in them; imports point down."""
    save(
        "rooms",
        860,
        430,
        box(250, 10, 360, 56, "scripts", "benchmarks, results, demo training: run from a checkout"),
        arrow(430, 66, 430, 88),
        box(
            110,
            90,
            640,
            74,
            "kvgauge",
            "import kvgauge as kg: the public face",
            "cli · configuration · loading · running · comparing · sweeping · report",
        ),
        arrow(290, 164, 230, 198),
        arrow(570, 164, 630, 198),
        box(
            20,
            200,
            400,
            90,
            "calib: how a quantizer is found",
            "text · statistics · estimators · solvers",
            "recipe · recipes · fitting · demo",
        ),
        box(
            440,
            200,
            400,
            90,
            "simquant: how it is used",
            "policy · cache · protocols · evaluation",
            "tasks · compat · kernels",
        ),
        arrow(230, 290, 290, 328),
        arrow(630, 290, 570, 328),
        box(
            110,
            330,
            640,
            90,
            "artifacts: what a quantizer is",
            "quantizers · coding · model · importers",
            "sites, specifications, codes, the file",
        ),
    )


def vector() -> None:
    """A vector's way, when a quantizer is fitted and when it is used."""
    save(
        "vector",
        900,
        380,
        text(20, 28, "fitting, once", 14, "start", "bold"),
        box(20, 44, 150, 70, "k_proj, v_proj", "one layer's vectors", "tokens × channels"),
        arrow(170, 79, 214, 79),
        box(216, 44, 160, 70, "statistics", "tails, histograms,", "moments, a sample"),
        arrow(376, 79, 420, 79),
        box(422, 44, 150, 70, "estimator", "reads statistics,", "never the model"),
        arrow(572, 79, 616, 79),
        box(618, 44, 120, 70, "quantizer", "encode, decode"),
        arrow(738, 79, 774, 79),
        box(776, 44, 110, 70, "artifact", "one file", fill=FILE),
        text(20, 190, "use, at every step", 14, "start", "bold"),
        box(20, 206, 150, 70, "key, value", "of a new token;", "keys before RoPE"),
        arrow(170, 241, 214, 241),
        box(216, 206, 160, 70, "cache policy", "sinks and recent", "in full precision"),
        arrow(376, 241, 420, 241, "older"),
        box(422, 206, 150, 70, "encode", "codes, scales,", "counted in bytes"),
        arrow(572, 241, 616, 241),
        box(618, 206, 120, 70, "decode", "one block", "at a time"),
        arrow(738, 241, 774, 241),
        box(776, 206, 110, 70, "attention", "RoPE, then", "softmax(qk)v"),
        arrow(678, 114, 505, 204),
        arrow(684, 114, 680, 204),
        f'<path d="M296,276 L296,330 L831,330 L831,280" fill="none" stroke="{INK}" marker-end="url(#head)"/>',
        text(560, 348, "tokens in full precision", 12),
    )


if __name__ == "__main__":
    protocols()
    rooms()
    vector()
