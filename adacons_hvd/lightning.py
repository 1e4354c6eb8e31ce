"""An aggregator for Lightning's ``Trainer``, whether of ``lightning`` or of ``pytorch_lightning``.

    trainer = L.Trainer(strategy="ddp", devices=2, callbacks=[AggregationCallback(AdaCons())])

Fabric needs no adapter: ``adacons_hvd.ddp.attach`` takes what ``fabric.setup()`` returned.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from typing import Any

from torch.nn.parallel import DistributedDataParallel

from .aggregators import Aggregator
from .ddp.attaching import attach, unwrapped_model
from .logging import scalars

__all__ = ["AggregationCallback"]


def _callback_class() -> Any:
    """``Callback`` of the package that the script uses; the Trainer of either takes that of the other."""
    names = sorted(["lightning.pytorch", "pytorch_lightning"], key=lambda name: name not in sys.modules)
    for name in names:
        if importlib.util.find_spec(name.partition(".")[0]):
            return importlib.import_module(name).Callback
    raise ModuleNotFoundError("adacons_hvd.lightning needs Lightning: pip install lightning")


class AggregationCallback(_callback_class()):  # type: ignore[misc]
    """Lets an aggregator combine the gradients of a Trainer's processes, instead of averaging.

    Every process makes it and gives it to its Trainer, whose strategy has to be one of
    ``DistributedDataParallel``: ``"ddp"`` or what begins with that word. Gradient accumulation and
    clipping, mixed precision, checkpoints and several optimizers are the Trainer's, as ever.

    Every ``log_every_n_steps`` steps of the optimizer, the Trainer's loggers get the report's
    numbers: ``adacons/spread``, ``adacons/fallbacks``, and the smallest and the largest weight, where
    1 is what an average would give each worker.

    Args:
        aggregator: for example ``AdaCons()``. With None, gradients are averaged as ever.
        options: the other arguments of :func:`adacons_hvd.ddp.attach`: ``schedule``,
            ``granularity``, ``check_replicas``, ... The loss scaler is found by itself.

    >>> from adacons_hvd import AdaCons
    >>> AggregationCallback(AdaCons(), granularity="layer").options
    {'granularity': 'layer'}
    """

    def __init__(self, aggregator: Aggregator | None, **options: Any) -> None:
        super().__init__()
        self.aggregator = aggregator
        self.options = options
        self._logged = 0

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Attach: the model is wrapped and has its optimizers, and their states are loaded after this."""
        model = unwrapped_model(trainer.strategy.model)
        if not isinstance(model, DistributedDataParallel):
            raise TypeError(
                f'AggregationCallback needs Trainer(strategy="ddp"), and this Trainer\'s is '
                f"{type(trainer.strategy).__name__}, which does not wrap the model in DistributedDataParallel"
            )
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        attach(model, trainer.optimizers, self.aggregator, **{"grad_scaler": scaler, **self.options})

    def on_train_batch_end(self, trainer: Any, *_: Any, **__: Any) -> None:
        """Log the report of a step that is due."""
        step = trainer.global_step
        if self.aggregator is None or step == self._logged or step % trainer.log_every_n_steps:
            return
        self._logged = step
        report = trainer.optimizers[0].report
        if report is not None and trainer.is_global_zero:
            for logger in trainer.loggers:
                # Lightning counts steps from zero where it logs.
                logger.log_metrics(scalars(report.as_dict()), step=step - 1)
