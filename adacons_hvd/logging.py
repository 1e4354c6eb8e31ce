"""Write down what the aggregator does, while training runs.

One line after the optimizer is made, for ``adacons_hvd.torch`` and ``adacons_hvd.ddp``:

    log_reports(optimizer, "run.jsonl")

and one callback for Keras: ``model.fit(..., callbacks=[keras_callback("run.jsonl")])``. (For the
spread and the fallbacks in Keras' own logs there is ``hvd.callbacks.AggregationLogger()``.) A loop
of your own calls a :class:`ReportLog` with the report of every step.

It is cheap enough to leave on. Of every ``every`` steps one is written, by one rank. Training only
hands over the report, whose numbers may still be on their way; a thread of the log's own waits for
them and writes. ``adacons watch run.jsonl`` shows the run while it goes on; ``adacons plot run.jsonl`` draws it.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import math
import os
import queue
import sys
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .report import Report

__all__ = ["ReportLog", "keras_callback", "log_reports", "scalars"]

#: How many reports may wait for the writer before training waits, too. They hold tensors.
_WAITING = 64


class ReportLog:
    """Call it with every step's report; it writes one of ``every``.

    Args:
        destination: the path of a JSONL file, which is added to if it exists; a TensorBoard writer: PyTorch's
            ``SummaryWriter`` or what ``tf.summary.create_file_writer`` returns; a run of Weights & Biases, which
            ``wandb.init()`` returns; or one of MLflow, which ``mlflow.start_run()`` returns.
        every: how many steps to a written one. The first step is written.

    >>> import json, pathlib, tempfile, torch
    >>> from adacons_hvd import AdaCons, Statistics
    >>> from adacons_hvd.costs import Choice
    >>> gradients = torch.tensor([[2.0, 0.0], [2.0, 1.0], [1.0, 1.0]])
    >>> decision, _ = AdaCons().explain(gradients)
    >>> path = pathlib.Path(tempfile.mkdtemp(), "run.jsonl")
    >>> with ReportLog(path) as log:
    ...     log(Report(decision, Statistics.of(gradients), Choice("gather", "an example")))
    >>> json.loads(path.read_text())["spread"]
    [0.0363887]
    """

    def __init__(self, destination: str | os.PathLike[str] | Any, every: int = 10) -> None:
        if every < 1:
            raise ValueError(f"every must be at least 1, got {every!r}")
        self.every = every
        #: The loss to write beside the next reports, a number or a tensor: ``log.loss = loss.detach()``.
        self.loss: Any = None
        self._write = _writer(destination)
        self._calls = 0
        self._queue: queue.Queue[Any] = queue.Queue(_WAITING)
        self._thread: threading.Thread | None = None

    def __call__(self, report: Report | Callable[[], Report | None] | None) -> None:
        """Take note of a step. None, the report before the first step, is no step.

        A function is only called for its report if this step is written.
        """
        if report is None:
            return
        if self._calls % self.every == 0:
            found = report() if callable(report) else report
            if found is None:
                return
            if self._thread is None:
                self._start()
            self._queue.put((found, time.time(), _stream_of(found), self.loss))
        self._calls += 1

    def close(self) -> None:
        """Write what is still waiting. Happens by itself when the program ends."""
        thread, self._thread = self._thread, None
        if thread is not None:
            self._queue.put(None)
            thread.join()
            atexit.unregister(self.close)

    def __enter__(self) -> ReportLog:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _start(self) -> None:
        self._thread = threading.Thread(target=self._work, name="adacons log", daemon=True)
        self._thread.start()
        atexit.register(self.close)

    def _work(self) -> None:
        working = True
        while (item := self._queue.get()) is not None:
            if not working:
                continue
            report, when, stream, loss = item
            try:
                with stream:
                    record = {"time": round(when, 3), **report.as_dict()}
                    if loss is not None:
                        record["loss"] = float(loss)
                self._write(record)
            except Exception as error:
                # A full disk must not end a training run of days.
                working = False
                warnings.warn(f"the log of aggregation reports ends here: {error}", stacklevel=1)


def log_reports(optimizer: Any, destination: str | os.PathLike[str] | Any, every: int = 10) -> ReportLog:
    """Log the reports of a PyTorch optimizer that has an aggregator, from now on.

    ``optimizer`` is what ``adacons_hvd.torch.DistributedOptimizer`` returned or
    ``adacons_hvd.ddp.attach`` was given. All ranks may call this; the first one writes. The other
    arguments are those of :class:`ReportLog`.

        optimizer = hvd.DistributedOptimizer(optimizer, model.named_parameters(), aggregator=AdaCons())
        log_reports(optimizer, "run.jsonl")
    """
    if not hasattr(optimizer, "report"):
        raise TypeError(
            f"{type(optimizer).__name__} has no aggregator, so there is nothing to log; for a logged average "
            "give it aggregator=Mean()"
        )
    if not hasattr(optimizer, "register_step_post_hook"):
        raise TypeError("log_reports is for optimizers of PyTorch; with Keras, give model.fit a keras_callback")
    log = ReportLog(destination, every)
    if _is_first(optimizer):
        optimizer.register_step_post_hook(lambda stepped, *_: log(stepped.report))
    return log


def keras_callback(destination: str | os.PathLike[str] | Any, every: int = 10) -> Any:
    """A callback for ``model.fit`` that logs reports; the arguments are those of :class:`ReportLog`.

    All ranks may have it; the first one writes.

        model.fit(x, y, callbacks=[keras_callback("run.jsonl", every=50)])
    """
    import keras

    class ReportCallback(keras.callbacks.Callback):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.log = ReportLog(destination, every)
            self.optimizer: Any = None

        def on_train_begin(self, logs: Any = None) -> None:
            from .keras.binding import distributed_part

            part = distributed_part(self.model.optimizer)
            self.optimizer = part if part is not None and _is_first(part) else None

        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            if self.optimizer is not None:
                self.log.loss = (logs or {}).get("loss")
                # With TensorFlow, a report is a copy of variables.
                self.log(lambda: self.optimizer.report)

        def on_train_end(self, logs: Any = None) -> None:
            self.log.close()

    return ReportCallback()


def _is_first(optimizer: Any) -> bool:
    """Whether this rank is the first of those that share gradients."""
    process_set = getattr(optimizer, "process_set", None)
    if process_set is not None:
        return bool(process_set.included() and process_set.rank() == 0)
    return bool(sys.modules["torch"].distributed.get_rank() == 0)


def _stream_of(report: Report) -> Any:
    """A context in which an accelerator's numbers are read after they were computed.

    Work on a GPU is in order only within one stream, and a new thread begins on another one.
    """
    weights = report.decision.weights
    if getattr(weights, "is_cuda", False) is True:
        cuda = sys.modules["torch"].cuda
        return cuda.stream(cuda.current_stream(weights.device))
    return contextlib.nullcontext()


# --- where it goes --------------------------------------------------------------------------------

Record = dict[str, Any]


def _writer(destination: Any) -> Callable[[Record], None]:
    if isinstance(destination, (str, os.PathLike)):
        return _JsonLines(Path(destination))
    if hasattr(destination, "add_scalar"):
        return lambda record: _to_summary_writer(destination, record)
    if hasattr(destination, "as_default"):
        return lambda record: _to_tf_summary(destination, record)
    module = type(destination).__module__.partition(".")[0]
    if module == "wandb":
        return lambda record: _to_wandb(destination, record)
    if module == "mlflow":
        return _ToMLflow(destination)
    raise TypeError(
        f"destination must be a path, a TensorBoard writer, or a run of Weights & Biases or MLflow, got {destination!r}"
    )


class _JsonLines:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.reason = ""

    def __call__(self, record: Record) -> None:
        # Long, and the same for thousands of steps.
        reason = record.pop("reason")
        if reason != self.reason:
            record["reason"] = self.reason = reason
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # Opened anew for each line, so that a rotated or removed file is no obstacle.
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(_short(record), allow_nan=False) + "\n")


def _short(value: Any) -> Any:
    """Six digits are enough to look at; JSON has no word for NaN and infinity but null."""
    if isinstance(value, float) and not value.is_integer():
        return float(f"{value:.6g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: value if key == "time" else _short(value) for key, value in value.items()}
    if isinstance(value, list):
        return [_short(item) for item in value]
    return value


def scalars(record: Record) -> dict[str, float]:
    """The few numbers of a report's dictionary that are worth a curve each."""
    # In units of what an average would give each worker.
    relative = [weight * len(row) / sum(row) for row in record["weights"] if sum(row) for weight in row]
    return {
        "adacons/spread": max(record["spread"]),
        "adacons/fallbacks": record["fallbacks"],
        "adacons/smallest weight": min(relative, default=math.nan),
        "adacons/largest weight": max(relative, default=math.nan),
        # That of the model where there is one group, and otherwise of its noisiest part.
        "adacons/noise scale": max(record["noise_scale"]),
        "adacons/adascale gain": min(record["adascale_gain"]),
        "adacons/lowest agreement": min(min(row) for row in record["agreement"]),
        "adacons/sick workers": len(record["sick"]),
    }


def _to_summary_writer(writer: Any, record: Record) -> None:
    for name, value in {**_agreements(record), **scalars(record)}.items():
        writer.add_scalar(name, value, record["steps"])


def _to_wandb(run: Any, record: Record) -> None:
    # The run's own steps are those of the training loop's calls, and go upwards only; ours has an axis of its own.
    for name in scalars(record):
        run.define_metric(name, step_metric="adacons/step")
    run.log({"adacons/step": record["steps"], **_agreements(record), **scalars(record)})


class _ToMLflow:
    def __init__(self, run: Any) -> None:
        # The run that is active belongs to a thread, and this is written by another one.
        self.run_id = run.info.run_id
        self.client = sys.modules["mlflow"].MlflowClient()

    def __call__(self, record: Record) -> None:
        for name, value in {**_agreements(record), **scalars(record)}.items():
            self.client.log_metric(self.run_id, name, value, step=record["steps"])


def _agreements(record: Record) -> dict[str, float]:
    """Each worker's agreement with the others, of the first group."""
    return {f"adacons/agreement/rank {rank}": value for rank, value in enumerate(record["agreement"][0])}


def _to_tf_summary(writer: Any, record: Record) -> None:
    tensorflow = sys.modules["tensorflow"]
    # Not tf.summary.scalar, which needs the package tensorboard where training runs.
    message = tensorflow.compat.v1.Summary()
    for name, value in {**_agreements(record), **scalars(record)}.items():
        message.value.add(tag=name, simple_value=value)
    with writer.as_default():
        tensorflow.summary.experimental.write_raw_pb(message.SerializeToString(), step=record["steps"])
