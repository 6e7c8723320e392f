"""What can be wrong with a task, its data or its predictions."""


class TaskError(ValueError):
    """A task cannot be run or scored as asked."""
