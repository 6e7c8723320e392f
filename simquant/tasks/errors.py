"""What can be wrong with a task, its data or its predictions."""

from artifacts.errors import KVGaugeError


class TaskError(KVGaugeError, ValueError):
    """A task cannot be run or scored as asked."""
