"""Tries every family of causal language models of transformers with a tiny random model, and prints a row for each.

`applied`: keys and values are found, calibrated and quantized, and a packed cache says what the simulation says.
`simulated`: the same without a packed cache. `refused`: by an error of kvgauge. `not built`: transformers makes no
model of the default configuration, or runs none. `wrong`: another error, or results that should agree differ; the exit
status is 1 then.
Five minutes on one core; each family runs in a process of its own. From the checkout: `python -m scripts.families`.
"""

import argparse
import json
import os
import signal
import sys
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging

from scripts.families.trial import Outcome, outcome

LIMIT_SECONDS = 120


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser("python -m scripts.families", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="TEXT", help="take families whose name has this (default: all)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there, too")
    args = parser.parse_args(argv)
    rows = []
    for family in sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        if not args.names or any(name in family for name in args.names):
            found = apart(family)
            rows.append({"name": family, **{name: value for name, value in asdict(found).items() if value}})
            print(f"{found.verdict:9}  {family:24} {found.layers:8} {found.why}".rstrip(), flush=True)
    counts = Counter(row["verdict"] for row in rows)
    print(", ".join(f"{number} {verdict}" for verdict, number in counts.most_common()))
    if args.json is not None:
        args.json.write_text(json.dumps({"families": rows, "counts": counts}, indent=1), encoding="utf-8")
    return int(counts["wrong"] > 0)


def apart(family: str) -> Outcome:
    """What becomes of a family in a process of its own, which ends after `LIMIT_SECONDS`."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        try:
            signal.alarm(LIMIT_SECONDS)
            torch.set_num_threads(1)
            logging.set_verbosity_error()
            warnings.simplefilter("ignore")
            os.write(writing, json.dumps(asdict(outcome(family))).encode())
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        said = pipe.read()
    _, status = os.waitpid(child, 0)
    if said:
        return Outcome(**json.loads(said))
    return Outcome("wrong", f"ended without a word: signal {os.WTERMSIG(status)} within {LIMIT_SECONDS} s")


if __name__ == "__main__":
    sys.exit(main())
