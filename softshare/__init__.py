"""softshare: convolutional networks whose layers share parameters softly, and fold into loops.

A reproduction of "Learning Implicitly Recurrent CNNs Through Parameter Sharing" (Savarese and Maire, ICLR 2019).

On CPUs that report Intel's AMX, the first import after a boot tries these units in a separate process and may set
ONEDNN_MAX_CPU_ISA; see `softshare.training.processor`.
"""

from . import images, models, shortest_path, training
from .bank import TemplateBank
from .files import cache_folder
from .folded import fold
from .folding import FoldPlan, plan_fold, tie
from .sharing import banks, decay_groups, mixed_once, share_, unshare
from .similarity import layer_similarity, recurrence_penalty, similarity_matrices
from .training.processor import avoid_crashing_units
from .training.recorder import SimilarityRecorder

__version__ = "0.1.0"

avoid_crashing_units(cache_folder())

__all__ = [
    "FoldPlan",
    "SimilarityRecorder",
    "TemplateBank",
    "banks",
    "decay_groups",
    "fold",
    "images",
    "layer_similarity",
    "mixed_once",
    "models",
    "plan_fold",
    "recurrence_penalty",
    "share_",
    "shortest_path",
    "similarity_matrices",
    "tie",
    "training",
    "unshare",
]
