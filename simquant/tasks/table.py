"""Tasks and groups of tasks by name."""

from collections.abc import Mapping

from simquant.tasks.answers import first_number_fits, found_share
from simquant.tasks.drift import Drift
from simquant.tasks.gsm8k import GSM8K
from simquant.tasks.longbench.tasks import longbench_tasks
from simquant.tasks.synthetic import puzzles
from simquant.tasks.synthetic.common_words import CommonWords
from simquant.tasks.synthetic.haystack import Haystack
from simquant.tasks.task import Task

_OWN: tuple[Task, ...] = (
    Haystack(
        name="passkey",
        metric="accuracy: the first number of the answer is the key",
        draw=puzzles.passkey,
        compare=first_number_fits,
        single=True,
    ),
    Haystack(
        name="needle",
        metric="accuracy: the answer names what the sentence tells",
        draw=puzzles.needle,
        compare=found_share,
        single=True,
    ),
    Haystack(
        name="multi_key",
        metric="accuracy: the first number of the answer is the one asked for",
        draw=puzzles.multi_key,
        compare=first_number_fits,
    ),
    Haystack(
        name="multi_value",
        metric="share of the right numbers that the answer names",
        draw=puzzles.multi_value,
        compare=found_share,
        max_new_tokens=32,
    ),
    Haystack(
        name="variables",
        metric="share of what is asked for that the answer names",
        draw=puzzles.variables,
        compare=found_share,
        max_new_tokens=32,
    ),
    CommonWords(),
    GSM8K(),
    Drift(),
)

TASKS: Mapping[str, Task] = {**{task.name: task for task in _OWN}, **longbench_tasks()}
"""Tasks by name."""

GROUPS: Mapping[str, tuple[str, ...]] = {
    "synthetic": ("multi_key", "multi_value", "variables", "common_words"),
}
"""Names of several tasks; see `longbench_group` for those of LongBench."""
