"""A user's model as something that has gradients and takes steps, whatever its framework."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from .errors import CommandError
from .sampling import Framework, map_leaves

__all__ = ["Model", "model_of"]


class Model(Framework, Protocol):
    """A gradient is a flat tensor of the framework's own, and a matrix has one in each row."""

    parameters: int
    optimizer: str

    def gradient(self, batch: Any) -> Any: ...

    def stack(self, gradients: list[Any]) -> Any: ...

    def apply(self, gradient: Any) -> None:
        """Take the optimizer's step."""
        ...


def model_of(made: Any, entry: str) -> tuple[Model, Any]:
    """The model and the data that the function ``entry`` returned."""
    parts = made if isinstance(made, tuple) else (made,)
    keras, torch = sys.modules.get("keras"), sys.modules.get("torch")
    if keras is not None and isinstance(parts[0], keras.Model):
        if len(parts) != 2:
            raise CommandError(f"{entry} must return (model, data) for Keras, and returned {_kinds(parts)}")
        return _keras_model(parts[0]), parts[1]
    if torch is not None and isinstance(parts[0], torch.nn.Module):
        if len(parts) not in (3, 4) or not callable(parts[1]):
            raise CommandError(
                f"{entry} must return (model, loss, data) or (model, loss, data, optimizer) for PyTorch, "
                f"and returned {_kinds(parts)}"
            )
        return _TorchModel(parts[0], parts[1], *parts[3:]), parts[2]
    raise CommandError(f"{entry} must return a model of PyTorch or Keras first, and returned {_kinds(parts)}")


def _kinds(parts: Sequence[Any]) -> str:
    return "(" + ", ".join(type(part).__name__ for part in parts) + ")"


class _TorchModel:
    def __init__(self, model: Any, loss: Callable[[Any, Any], Any], optimizer: Any = None) -> None:
        import torch
        from torch.utils.data import default_collate

        self._torch = torch
        self._model, self._loss = model.train(), loss
        self._trained = [p for p in model.parameters() if p.requires_grad]
        if not self._trained:
            raise CommandError("the model has no trainable parameters")
        self._optimizer = torch.optim.Adam(self._trained) if optimizer is None else optimizer
        self.optimizer = type(self._optimizer).__name__
        self.parameters = sum(p.numel() for p in self._trained)
        self.collate: Callable[[list[Any]], Any] | None = default_collate

    def join(self, tensors: list[Any]) -> Any:
        return self._torch.cat([self._torch.as_tensor(tensor) for tensor in tensors])

    def gradient(self, batch: Any) -> Any:
        device = self._trained[0].device
        batch = map_leaves(lambda leaf: leaf.to(device) if hasattr(leaf, "to") else leaf, batch)
        loss = self._loss(self._model, batch)
        found = self._torch.autograd.grad(loss, self._trained, allow_unused=True)
        flat = [
            self._torch.zeros_like(p) if g is None else g.to_dense() if g.is_sparse else g
            for p, g in zip(self._trained, found, strict=True)
        ]
        return self._torch.cat([g.detach().reshape(-1).float() for g in flat])

    def stack(self, gradients: list[Any]) -> Any:
        return self._torch.stack(gradients)

    def apply(self, gradient: Any) -> None:
        pieces = gradient.split([p.numel() for p in self._trained])
        for parameter, piece in zip(self._trained, pieces, strict=True):
            parameter.grad = piece.view_as(parameter).to(parameter.dtype)
        self._optimizer.step()


def _keras_model(model: Any) -> Model:
    import keras

    if not model.compiled:
        raise CommandError("the Keras model must be compiled, with an optimizer and a loss")
    if not model.built:
        raise CommandError("the Keras model must be built: give it an Input, or call it once")
    if not model.trainable_variables:
        raise CommandError("the model has no trainable parameters")
    kinds: dict[str, type[_KerasModel]] = {"tensorflow": _KerasOnTensorFlow, "torch": _KerasOnTorch}
    kind = kinds.get(keras.backend.backend())
    if kind is None:
        raise CommandError(f"Keras runs on {keras.backend.backend()} here, and must on tensorflow or torch")
    return kind(model)


class _KerasModel:
    """The parts that both backends share."""

    # Data sets of Keras that have a length hold batches.
    collate: Callable[[list[Any]], Any] | None = None

    def __init__(self, model: Any) -> None:
        import keras
        import numpy as np

        self._ops, self._concatenate = keras.ops, np.concatenate
        self._model = model
        self._trained = model.trainable_variables
        self.optimizer = type(model.optimizer).__name__
        self.parameters = sum(int(np.prod(v.shape)) for v in self._trained)

    def join(self, tensors: list[Any]) -> Any:
        return self._concatenate([self._ops.convert_to_numpy(tensor) for tensor in tensors])

    def loss(self, batch: Any) -> Any:
        if not isinstance(batch, (tuple, list)) or len(batch) not in (2, 3):
            raise CommandError("batches for a Keras model must be (x, y) or (x, y, sample_weight)")
        x, y, *rest = batch
        return self._model.compute_loss(x, y, self._model(x, training=True), *rest)

    def gradient(self, batch: Any) -> Any:
        flat = [self._ops.reshape(g, (-1,)) for g in self.gradients(batch)]
        return self._ops.cast(self._ops.concatenate(flat), "float32")

    def gradients(self, batch: Any) -> list[Any]:
        raise NotImplementedError

    def stack(self, gradients: list[Any]) -> Any:
        return self._ops.stack(gradients)

    def apply(self, gradient: Any) -> None:
        pieces, start = [], 0
        for variable in self._trained:
            stop = start + self._ops.size(variable)
            pieces.append(self._ops.cast(self._ops.reshape(gradient[start:stop], variable.shape), variable.dtype))
            start = stop
        self._model.optimizer.apply(pieces, self._trained)


class _KerasOnTensorFlow(_KerasModel):
    def gradients(self, batch: Any) -> list[Any]:
        import tensorflow as tf

        with tf.GradientTape() as tape:
            loss = self.loss(batch)
        found = tape.gradient(loss, [v.value for v in self._trained])
        pairs = zip(self._trained, found, strict=True)
        return [tf.zeros(v.shape) if g is None else tf.convert_to_tensor(g) for v, g in pairs]


class _KerasOnTorch(_KerasModel):
    def gradients(self, batch: Any) -> list[Any]:
        import torch

        values = [v.value for v in self._trained]
        found = torch.autograd.grad(self.loss(batch), values, allow_unused=True)
        return [torch.zeros_like(v) if g is None else g for v, g in zip(values, found, strict=True)]

    def apply(self, gradient: Any) -> None:
        import torch

        with torch.no_grad():
            super().apply(gradient)
