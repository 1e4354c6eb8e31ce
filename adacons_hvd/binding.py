"""Until TensorFlow's and Keras' bindings import these from where they are."""

from .engine.memory import STATE_KEY, State
from .engine.plan import group_parameters
from .engine.session import ONLY_SUMS, canonical_names, choose_schedule
from .engine.settings import BUCKET_BYTES

__all__ = ["BUCKET_BYTES", "ONLY_SUMS", "STATE_KEY", "State", "canonical_names", "choose_schedule", "group_parameters"]
