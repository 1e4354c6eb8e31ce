"""What the user asked for, in a form that can be compared, and what identifies a variable."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

import horovod.tensorflow as hvd
import tensorflow as tf
from horovod.tensorflow.mpi_ops import ProcessSet

from ..aggregators import Aggregator
from ..costs import Network
from ..engine.replicas import CHECK_REPLICAS
from ..engine.settings import BUCKET_BYTES

__all__ = ["Named", "Settings", "is_variable", "key_of", "native"]


def native(variable: Any) -> Any:
    """TensorFlow's variable, where Keras 3 gave one of its own."""
    value = getattr(variable, "value", None)
    return value if isinstance(value, tf.Variable) else variable


def is_variable(thing: Any) -> bool:
    """Whether this is a variable, of TensorFlow or of Keras 3."""
    return isinstance(native(thing), tf.Variable)


def key_of(variable: Any, position: int = 0) -> Hashable:
    """What identifies a variable; a mere tensor is known by its position."""
    variable = native(variable)
    return variable._unique_id if isinstance(variable, tf.Variable) else ("tensor", position)


@dataclass(frozen=True)
class Named:
    """A variable that an argument names. It is known by its key, so that the argument keeps no model alive."""

    key: Hashable
    _reference: weakref.ref[Any] = field(compare=False, repr=False)

    @classmethod
    def of(cls, variable: Any) -> Named:
        return cls(key_of(variable), weakref.ref(variable))

    def if_trainable(self) -> Any:
        """The variable if it is there and surely meant to be trained, else None."""
        variable = self._reference()
        if variable is None or not variable.trainable:
            return None
        # Keras 2 freezes a layer without a word to the layer's variables.
        return None if "tf_keras" in sys.modules and variable is native(variable) else variable


#: Lists of variables, as an argument has them.
Lists = tuple[tuple[Named, ...], ...]


@dataclass(frozen=True)
class Settings:
    """What the user asked for; see ``DistributedOptimizer``. Equal settings are equal objects, so all can be a key."""

    aggregator: Aggregator | None
    schedule: str | Network = "auto"
    granularity: str | Lists = "model"
    # Left out of the hash, but not of the comparison: a compressor of the user's own need not have a hash.
    compression: Any = field(default=None, hash=False)
    gradient_predivide_factor: float = 1.0
    groups: int | Lists | None = None
    sparse_as_dense: bool = False
    process_set: ProcessSet = hvd.global_process_set
    bucket_bytes: int = BUCKET_BYTES
    op: int = hvd.Average
    device_dense: str = ""
    device_sparse: str = ""
    check_replicas: int = CHECK_REPLICAS
    #: The keys of variables that are meant to differ between ranks.
    may_differ: frozenset[Hashable] = frozenset()
