"""Recipes that `kvgauge compare` has measured, to be shown beside the one of a report."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvgauge.terminal.console import UsageError


def compared(path: Path, result: Mapping[str, Any] | None) -> dict[str, Any]:
    """Bits and losses by recipe, and whether they come from the same text.

    Parameters
    ----------
    path : Path
        `results.json`.
    result : mapping or None
        `EvalResult.to_json` of the report's own run.

    Raises
    ------
    UsageError
        If the file is not what `kvgauge compare` writes.
    """
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
        points = [
            {
                "name": str(recipe["name"]),
                "bits": float(recipe["bits"]["average"]),
                "loss_nats": _number(recipe["loss_nats"]),
                "loss_nats_stderr": _number(recipe["loss_nats_stderr"]),
            }
            for recipe in read["recipes"]
        ]
        perplexity = float(read["perplexity"])
        text = str(read["evaluation"]["text"])
    except OSError as error:
        raise UsageError(f"--report-compare {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"--report-compare {path}: expected results.json of `kvgauge compare`; got another file ({error!r})"
        ) from error
    own = result["fp"]["perplexity"] if result else None
    # The perplexity of the exact model stands for model, text and windows together; a thousandth leaves room for
    # another dtype or machine.
    same = own is not None and math.isclose(own, perplexity, rel_tol=1e-3)
    return {"file": path.name, "text": text, "fp_perplexity": perplexity, "same_text": same, "points": points}


def _number(value: Any) -> float | None:
    return None if value is None else float(value)
