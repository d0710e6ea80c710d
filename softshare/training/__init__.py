"""Training: `fit` for any model and task, its settings, tasks, checkpoints, several devices, and what it records."""

from .checkpoints import ForeignCheckpoint, read_checkpoint
from .devices import NoSuchDevice, pick_device, pick_precision
from .environment import environment
from .evaluation import evaluate, with_reestimated_statistics
from .loop import History, fit
from .recorder import SimilarityRecorder
from .settings import Schedule, Settings
from .step import make_optimizer, train_step
from .tasks import Classification, Curriculum, ShortestPaths, Task

__all__ = [
    "Classification",
    "Curriculum",
    "ForeignCheckpoint",
    "History",
    "NoSuchDevice",
    "Schedule",
    "Settings",
    "ShortestPaths",
    "SimilarityRecorder",
    "Task",
    "environment",
    "evaluate",
    "fit",
    "make_optimizer",
    "pick_device",
    "pick_precision",
    "read_checkpoint",
    "train_step",
    "with_reestimated_statistics",
]
