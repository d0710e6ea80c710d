"""Labelled images: CIFAR-10 and CIFAR-100, any image folder or archive of one, embedded digits; and their augmentation.

Everything is read from local files into one uint8 tensor. Nothing is ever unpickled (CIFAR has a binary edition of
fixed-size records), archives are never unpacked to disk, and checksums are verified before a byte is parsed.
"""

from .augmentation import Augmentation
from .loading import NAMES, load
from .sets import CIFAR10_CLASSES, SIDE, STATISTICS, ImageSet

__all__ = ["CIFAR10_CLASSES", "NAMES", "SIDE", "STATISTICS", "Augmentation", "ImageSet", "load"]
