"""Errors of tasks, their data and their predictions."""

from artifacts.errors import KVGaugeError


class TaskError(KVGaugeError, ValueError):
    """Task that cannot be run or scored as asked."""
