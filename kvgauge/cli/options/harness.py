"""Options of the command line about tasks of lm-evaluation-harness."""

import argparse
from pathlib import Path

from kvgauge.cli.options import common as options

OF_LM_EVAL = ("lm_eval_limit", "lm_eval_fewshot", "lm_eval_include")
"""Names of options that go with its tasks alone."""


def add_lm_eval_options(parser: argparse.ArgumentParser) -> None:
    """Adds the tasks of the harness."""
    group = parser.add_argument_group("lm-evaluation-harness (pip install lm-eval)")
    group.add_argument("--lm-eval", metavar="TASKS", help="its tasks, such as gsm8k,wikitext")
    group.add_argument("--lm-eval-limit", type=options.positive, metavar="N", help="documents of a task at most")
    group.add_argument(
        "--lm-eval-fewshot", type=int, metavar="N", help="examples in a prompt (default: the task's own)"
    )
    group.add_argument("--lm-eval-include", type=Path, metavar="FOLDER", help="more tasks, as .yaml files")
