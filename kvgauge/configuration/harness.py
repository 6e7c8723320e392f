"""Tasks of lm-evaluation-harness."""

from dataclasses import dataclass
from pathlib import Path

from kvgauge.terminal.console import UsageError


@dataclass(frozen=True, kw_only=True)
class HarnessConfig:
    """Tasks of the harness, and their documents.

    Parameters
    ----------
    lm_eval : str or None
        Names of tasks, with commas between; None where none is asked for.
    lm_eval_limit : int or None
        Documents of a task at most.
    lm_eval_fewshot : int or None
        Examples in a prompt; None is the task's own number.
    lm_eval_include : Path or None
        Folder of more tasks.

    Raises
    ------
    UsageError
        If the number of examples is negative.
    """

    lm_eval: str | None = None
    lm_eval_limit: int | None = None
    lm_eval_fewshot: int | None = None
    lm_eval_include: Path | None = None

    def __post_init__(self) -> None:
        if self.lm_eval_fewshot is not None and self.lm_eval_fewshot < 0:
            raise UsageError(f"--lm-eval-fewshot: expected a number from 0; got {self.lm_eval_fewshot}")

    @property
    def names(self) -> list[str]:
        """The tasks one by one."""
        return [name.strip() for name in (self.lm_eval or "").split(",") if name.strip()]
