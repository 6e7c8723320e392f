"""Options of the command line about tasks of lm-evaluation-harness."""

import argparse
from pathlib import Path

from kvgauge.cli.options import common as options

OF_LM_EVAL = ("lm_eval_limit", "lm_eval_fewshot", "lm_eval_include")
"""Names of options that go with its tasks alone."""


def add_lm_eval_options(parser: argparse.ArgumentParser) -> None:
    """Adds the tasks of the harness."""
    group = parser.add_argument_group("lm-evaluation-harness (needs: pip install lm-eval)")
    group.add_argument("--lm-eval", metavar="A,B,...", help="tasks of the harness, such as gsm8k,wikitext")
    group.add_argument(
        "--lm-eval-limit", type=options.positive, metavar="N", help="use at most N documents of each task"
    )
    group.add_argument(
        "--lm-eval-fewshot", type=int, metavar="N", help="few-shot examples per prompt (default: as the task has it)"
    )
    group.add_argument("--lm-eval-include", type=Path, metavar="FOLDER", help="folder with more tasks, as .yaml files")
