"""Generation tasks: scores of a model's answers with a quantized cache, against the same model in full precision."""

from simquant.tasks.errors import TaskError
from simquant.tasks.generation import Answer, answer
from simquant.tasks.item import Item
from simquant.tasks.options import TaskOptions
from simquant.tasks.predict import predict
from simquant.tasks.prediction import Prediction, append_prediction, read_predictions
from simquant.tasks.result import TaskResult
from simquant.tasks.score import score_predictions
from simquant.tasks.table import GROUPS, TASKS
from simquant.tasks.task import Task

__all__ = [
    "GROUPS",
    "TASKS",
    "Answer",
    "Item",
    "Prediction",
    "Task",
    "TaskError",
    "TaskOptions",
    "TaskResult",
    "answer",
    "append_prediction",
    "predict",
    "read_predictions",
    "score_predictions",
]
