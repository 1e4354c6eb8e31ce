"""An aggregator for Transformers' ``Trainer``.

    trainer = AggregationTrainer(model, args, train_dataset=data, aggregator=AdaCons())

A subclass of your own takes :class:`AggregationMixin` in front of its base:
``class MyTrainer(AggregationMixin, Trainer)``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainerCallback

from .aggregators import Aggregator
from .ddp.attaching import attach, unwrapped_model
from .logging import scalars

__all__ = ["AggregationMixin", "AggregationTrainer"]


class AggregationMixin:
    """Lets an aggregator combine the gradients of a Trainer's processes, instead of averaging.

    Stands before ``Trainer``, or a class made from it, among the bases of a class. Gradient
    accumulation and clipping, mixed precision, evaluation, saving and resuming are the Trainer's, as
    ever. Where it logs the loss, it also logs the last report's numbers: ``adacons/spread``,
    ``adacons/fallbacks``, and the smallest and the largest weight, where 1 is what an average would
    give each worker.

    Args:
        aggregator: for example ``AdaCons()``. With None, gradients are averaged as ever.
        aggregation: the other arguments of :func:`adacons_hvd.ddp.attach`, by name: ``schedule``,
            ``granularity``, ``check_replicas``, ...

    All other arguments are the Trainer's.
    """

    # What the Trainer has.
    args: Any
    optimizer: Any
    model_wrapped: Any

    def __init__(
        self,
        *args: Any,
        aggregator: Aggregator | None,
        aggregation: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        if not hasattr(super(), "_load_optimizer_and_scheduler"):
            raise TypeError(
                f"{type(self).__name__} has no _load_optimizer_and_scheduler(), before which an aggregator must be "
                "attached: AggregationMixin has to stand before a Trainer of transformers among the bases"
            )
        if self.args.auto_find_batch_size:
            raise ValueError(
                "auto_find_batch_size wraps the model anew when a process runs out of memory, which an aggregator "
                "cannot follow: choose the batch size, and leave it out"
            )
        self.aggregator = aggregator
        self.aggregation = dict(aggregation or {})
        self._attached: Any = None
        trainer: Any = self
        trainer.add_callback(_AttachAtBegin(trainer))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        # When training begins, which is when callbacks are asked, it is too late: the optimizer has been given its
        # state, and what the aggregator remembers would be lost.
        self.attach_aggregator()
        super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]

    def attach_aggregator(self) -> None:
        """Attach to the wrapped model and its optimizer, if that is not done."""
        model = unwrapped_model(self.model_wrapped)
        if (model, self.optimizer) == self._attached:
            return
        if not isinstance(model, DistributedDataParallel):
            raise TypeError(
                f"{type(self).__name__} needs a model in DistributedDataParallel, and this one is in "
                f"{type(model).__name__}: start one process for each device, with torchrun or accelerate launch, "
                "without FSDP and DeepSpeed"
            )
        attach(model, self.optimizer, self.aggregator, **self.aggregation)
        self._attached = model, self.optimizer

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the report's numbers where the loss is logged."""
        report = getattr(self.optimizer, "report", None)
        if report is not None and "loss" in logs:
            logs.update(scalars(report.as_dict()))
        super().log(logs, *args, **kwargs)  # type: ignore[misc]


class _AttachAtBegin(TrainerCallback):  # type: ignore[misc]
    """Attaches where no checkpoint is loaded."""

    def __init__(self, trainer: AggregationMixin) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.attach_aggregator()


class AggregationTrainer(AggregationMixin, Trainer):  # type: ignore[misc]
    """Transformers' ``Trainer`` with an aggregator: see :class:`AggregationMixin` for the arguments."""
