"""A book you can run: a small FCOS object detector derived line by line, and the package that trains it for real."""

__version__ = "0.1.0"

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")   # TensorFlow's greetings would drown what the commands say


def __getattr__(name):
    "`from fcos_lite import FCOS`, without loading Keras before it is wanted."
    if name != "FCOS": raise AttributeError(f"module 'fcos_lite' has no attribute {name!r}")
    from fcos_lite.detector.model import FCOS
    return FCOS
