"""Many steps, and what a process has to show for them. Runs on the ranks."""

from __future__ import annotations

import gc
import hashlib
import os
import statistics
import threading
import time
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

WARM_UP = 50
SENDING = ("allreduce", "alltoall", "allgather", "allgather_rows")


class Watch:
    """Looks at a process before the first of ``steps`` steps, half-way and after the last, and times every step.

    Call `begin` and `end` around each, those of the warm-up included. Objects from before it are not counted.
    """

    def __init__(self, steps: int, possessions: Callable[[], dict[str, int]]) -> None:
        self._looks = (WARM_UP, WARM_UP + steps // 2, WARM_UP + steps)
        self._possessions = possessions
        # All of it now, so that writing times down is no growth.
        self._times = array("d", bytes(8 * (WARM_UP + steps)))
        self._step = 0
        self._start = 0.0
        self._seen: list[dict[str, int]] = []
        # A list of all objects takes megabytes that the process then keeps, and would be the growth that is looked for.
        gc.collect()
        gc.freeze()

    def begin(self, *_: Any, **__: Any) -> None:
        self._start = time.perf_counter()

    def end(self, *_: Any, **__: Any) -> None:
        self._times[self._step] = time.perf_counter() - self._start
        self._step += 1
        if self._step in self._looks:
            self._seen.append(self._kept())

    def _kept(self) -> dict[str, int]:
        # What is kept is there at every look. Horovod's own thread holds the tensors of a step for some milliseconds
        # after the step, seen up to an eighth of a second on a busy machine, and is not to be mistaken for that.
        least: dict[str, int] = {}
        for _ in range(6):
            time.sleep(0.1)
            gc.collect()
            least = {what: min(number, least.get(what, number)) for what, number in self._possessions().items()}
        return least

    def result(self, weights: Sequence[Any]) -> dict[str, Any]:
        """Return what was seen, how long the first and the last steps took, and the weights."""
        import numpy as np

        gc.unfreeze()
        assert self._step == len(self._times), f"{self._step} steps of {len(self._times)}"
        times = self._times[WARM_UP:]
        part = max(len(times) // 5, 1)
        return {
            "seen": self._seen,
            "first": statistics.median(times[:part]),
            "last": statistics.median(times[-part:]),
            "finite": all(bool(np.isfinite(weight).all()) for weight in weights),
            "weights": hashlib.sha256(b"".join(weight.tobytes() for weight in weights)).hexdigest(),
        }


def check(results: list[dict[str, Any]]) -> None:
    """Nothing may have grown since the warm-up, memory and objects not since half-time; all ranks hold the same."""
    assert len({result["weights"] for result in results}) == 1, f"ranks hold different weights: {results}"
    for result in results:
        start, middle, end = result["seen"]
        for what in set(start) - {"KiB", "objects"}:
            assert end[what] == middle[what] == start[what], f"{what}: {result}"
        # Fewer than one for each step of the shortest run. A few come and go in TensorFlow itself.
        assert end["objects"] - middle["objects"] < 100, result
        # Over 10,000 steps a hundred bytes per step; a tensor kept each step would be hundreds.
        assert end["KiB"] - middle["KiB"] < 1024, result
        assert result["finite"]


def of_any_process() -> dict[str, int]:
    """Count the resources of which a process that leaks has more and more."""
    # Of the memory that is the process's own. What is read from libraries comes in pieces of megabytes, at any time.
    status = Path("/proc/self/status").read_text()
    (resident,) = (line.split()[1] for line in status.splitlines() if line.startswith("RssAnon"))
    return {
        "KiB": int(resident),
        "threads": threading.active_count() + len(os.listdir("/proc/self/task")),  # noqa: PTH208
        "files": len(os.listdir("/proc/self/fd")),  # noqa: PTH208
        "objects": len(gc.get_objects()),
    }


@contextmanager
def counting(collectives: type, *methods: str) -> Iterator[Counter[str]]:
    """How often these methods are called, by the names of the tensors."""
    calls: Counter[str] = Counter()
    original = {method: getattr(collectives, method) for method in methods}

    def counted(operation: Any) -> Any:
        def call(self: Any, tensor: Any, name: str, **options: Any) -> Any:
            calls[name] += 1
            return operation(self, tensor, name, **options)

        return call

    for method, operation in original.items():
        setattr(collectives, method, counted(operation))
    try:
        yield calls
    finally:
        for method, operation in original.items():
            setattr(collectives, method, operation)


def pytorch(steps: int, sparse: bool) -> dict[str, Any]:
    """Steps of PyTorch, with a second optimizer for sparse gradients if asked for."""
    import torch
    from horovod.torch import mpi_ops

    import adacons_hvd.torch as hvd
    from adacons_hvd import AdaCons
    from adacons_hvd.collectives.horovod_torch import HorovodTorch
    from adacons_hvd.torch.reducer import end_what_is_carried

    hvd.init()
    torch.manual_seed(0)
    table = torch.nn.Embedding(20, 8, sparse=sparse)
    body = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
    parts = [(body, {"schedule": "one-pass", "bucket_bytes": 256})]
    if sparse:
        parts.append((table, {"granularity": "layer"}))
    optimizers = [
        hvd.DistributedOptimizer(torch.optim.SGD(part.parameters(), lr=0.001), aggregator=AdaCons(), **options)
        for part, options in parts
    ]
    draw = torch.Generator().manual_seed(hvd.rank())

    def possessions() -> dict[str, int]:
        end_what_is_carried()  # or there is one thing more or less, as messages have come
        return of_any_process() | {
            "names": len(calls),
            "handles": len(mpi_ops._handle_map),
            "tensors": sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects()),
        }

    with counting(HorovodTorch, *SENDING) as calls:
        watch = Watch(steps, possessions)
        for _ in range(WARM_UP + steps):
            watch.begin()
            for optimizer in optimizers:
                optimizer.zero_grad()
            x = table(torch.randint(0, 20, (8,), generator=draw))
            (body(x) - 3 - 0.1 * hvd.rank()).square().mean().backward()
            for optimizer in optimizers:
                optimizer.step()
            watch.end()
    return watch.result([p.detach().numpy() for p in body.parameters()])


def tape(steps: int, in_graph: bool) -> dict[str, Any]:
    """Steps of TensorFlow, each with a tape of its own for as long as it runs eagerly."""
    import tensorflow as tf

    import adacons_hvd.tensorflow as hvd
    from adacons_hvd import AdaCons
    from adacons_hvd.collectives.horovod_tensorflow import HorovodTensorFlow

    hvd.init()
    tf.random.set_seed(0)
    variables = [tf.Variable(tf.random.normal(shape)) for shape in ((20, 8), (8, 16), (16,), (16, 1))]
    aggregator = AdaCons()

    def step(rows: tf.Tensor) -> None:
        table, first, bias, second = variables
        with tf.GradientTape() as plain:
            inner = tf.tanh(tf.gather(table, rows) @ first + bias)
            loss = tf.reduce_mean(tf.square(inner @ second - 3 - 0.1 * hvd.rank()))
        tape = hvd.DistributedGradientTape(plain, aggregator=aggregator, schedule="one-pass", bucket_bytes=256)
        for variable, gradient in zip(variables, tape.gradient(loss, variables), strict=True):
            variable.assign_sub(0.001 * tf.convert_to_tensor(gradient))

    take = tf.function(step) if in_graph else step
    draw = tf.random.Generator.from_seed(hvd.rank())
    with counting(HorovodTensorFlow, *SENDING) as calls:
        # A collective is called when a function is traced, not when it runs.
        watch = Watch(steps, lambda: of_any_process() | {"names": len(calls), "traced": calls.total()})
        for _ in range(WARM_UP + steps):
            watch.begin()
            take(draw.uniform((8,), 0, 20, tf.int32))
            watch.end()
    return watch.result([variable.numpy() for variable in variables])


def keras(steps: int) -> dict[str, Any]:
    """Steps of a Keras model's ``fit``."""
    import keras
    import numpy as np

    import adacons_hvd.keras as hvd
    from adacons_hvd import AdaCons

    hvd.init()
    x = np.random.default_rng(hvd.rank()).standard_normal((8, 6), np.float32)
    y = x.sum(1, keepdims=True) - 3 - 0.1 * hvd.rank()

    # Without an end: TensorFlow asks for batches ahead, and what it does at the end would be seen after the last step.
    def batches() -> Iterator[Any]:
        while True:
            yield x, y

    layers = keras.layers
    model = keras.Sequential([keras.Input((6,)), layers.Dense(5, activation="tanh"), layers.Dense(1)])
    optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(0.001), aggregator=AdaCons())
    model.compile(optimizer, "mse")
    watch = Watch(steps, of_any_process)
    around = keras.callbacks.LambdaCallback(on_train_batch_begin=watch.begin, on_train_batch_end=watch.end)
    callbacks = [hvd.callbacks.BroadcastGlobalVariablesCallback(0), around]
    model.fit(batches(), steps_per_epoch=WARM_UP + steps, verbose=0, callbacks=callbacks)
    return watch.result(model.get_weights())
