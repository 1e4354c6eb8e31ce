"""Sick workers and the report's numbers on real ranks, in every binding: equal on all of them and as the oracle's."""

from __future__ import annotations

import functools
import hashlib
import importlib
import itertools
from typing import Any

import harness
import insight_oracle
import numpy as np
import pytest
from harness.launchers import ON_TORCH

WORKERS, SICK, BEGIN, END, STEPS, RATE = 4, 2, 20, 60, 100, 0.125
#: When the state is saved and loaded by another optimizer, while the worker is sick.
SAVED = 45
SIZES = (35, 25)


def everyones(step: int) -> np.ndarray:
    """All workers' gradients."""
    rows = (np.random.default_rng(step).standard_normal((4, 60)) + 0.6).astype(np.float32)
    if 20 <= step < 60:
        rows[2] *= -3
    return rows


# --- a binding each: functions that take a step, report on it, and save the state and load it, into another optimizer
# if there is one

_names = itertools.count()


def over_horovod(aggregator: Any, schedule: str, start: np.ndarray) -> tuple[Any, ...]:
    import torch

    harness.horovod_torch()
    import adacons_hvd.torch as hvd

    parameters = [torch.nn.Parameter(torch.tensor(part)) for part in np.split(start, [35])]
    named = [(f"insight.{next(_names)}", p) for p in parameters]
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(parameters, lr=0.125), named, aggregator=aggregator, schedule=schedule
    )

    def step(gradient: np.ndarray) -> np.ndarray:
        optimizer.zero_grad()
        pairs = zip(parameters, np.split(gradient, [35]), strict=True)
        sum((p * torch.tensor(g)).sum() for p, g in pairs).backward()
        optimizer.step()
        return np.concatenate([p.detach().numpy().copy() for p in parameters])

    def reload(at: np.ndarray) -> tuple[Any, ...]:
        another = over_horovod(aggregator, schedule, at)
        another[-1](optimizer.state_dict())
        return another

    return step, lambda: optimizer.report, reload, optimizer.load_state_dict


def over_ddp(aggregator: Any, schedule: str, start: np.ndarray) -> tuple[Any, ...]:
    import torch
    import torch.distributed as dist

    import adacons_hvd.ddp

    if not dist.is_initialized():
        dist.init_process_group("gloo")

    class Linear(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = torch.nn.ParameterList([torch.tensor(part) for part in np.split(start, [35])])

        def forward(self, gradient: torch.Tensor) -> torch.Tensor:
            pairs = zip(self.parts, gradient.split([35, 25]), strict=True)
            return torch.stack([(p * g).sum() for p, g in pairs]).sum()

    model = torch.nn.parallel.DistributedDataParallel(Linear())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.125)
    adacons_hvd.ddp.attach(model, optimizer, aggregator, schedule=schedule)

    def step(gradient: np.ndarray) -> np.ndarray:
        optimizer.zero_grad()
        model(torch.tensor(gradient)).backward()
        optimizer.step()
        return np.concatenate([p.detach().numpy().copy() for p in model.parameters()])

    def reload(at: np.ndarray) -> tuple[Any, ...]:
        another = over_ddp(aggregator, schedule, at)
        another[-1](optimizer.state_dict())
        return another

    return step, lambda: optimizer.report, reload, optimizer.load_state_dict


def over_tape(graph: bool, aggregator: Any, schedule: str, start: np.ndarray) -> tuple[Any, ...]:
    import tensorflow as tf

    import adacons_hvd.tensorflow as hvd

    hvd.init()
    variables = [tf.Variable(part) for part in np.split(start, [35])]
    state = hvd.TapeState()
    tapes = []

    def train(gradient):
        with tf.GradientTape() as tape:
            pairs = zip(variables, tf.split(gradient, [35, 25]), strict=True)
            loss = tf.add_n([tf.reduce_sum(v * g) for v, g in pairs])
        tape = hvd.DistributedGradientTape(tape, aggregator=aggregator, schedule=schedule)
        tapes[:] = [tape]
        for variable, found in zip(variables, tape.gradient(loss, variables), strict=True):
            variable.assign_sub(0.125 * found)

    train = tf.function(train) if graph else train

    def step(gradient: np.ndarray) -> np.ndarray:
        train(tf.constant(gradient))
        return np.concatenate([v.numpy() for v in variables])

    def reload(at: np.ndarray) -> tuple[Any, ...]:
        saved = state.state_dict()
        state.load_state_dict({})
        state.load_state_dict(saved)
        return step, lambda: tapes[0].report, reload

    return step, lambda: tapes[0].report, reload


def over_keras(which: str, aggregator: Any, schedule: str, start: np.ndarray) -> tuple[Any, ...]:
    keras = importlib.import_module(which)
    if which == "tf_keras":
        import tensorflow as tf

        import adacons_hvd.tensorflow.keras as hvd

        variable, tensor = tf.Variable, tf.constant
    else:
        import adacons_hvd.keras as hvd

        variable, tensor = keras.Variable, keras.ops.convert_to_tensor
    from adacons_hvd.keras.binding import distributed_part

    hvd.init()
    variables = [variable(part) for part in np.split(start, [35])]
    optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(0.125), aggregator=aggregator, schedule=schedule)
    optimizer.build(variables)

    def step(gradient: np.ndarray) -> np.ndarray:
        gradients = map(tensor, np.split(gradient, [35]))
        optimizer.apply_gradients(zip(gradients, variables, strict=True))
        return np.concatenate([v.numpy() for v in variables])

    def reload(at: np.ndarray) -> tuple[Any, ...]:
        exchange = distributed_part(optimizer)._adacons.exchange
        another = over_keras(which, aggregator, schedule, at)
        another[-1](exchange.state_dict())
        return another

    return step, lambda: optimizer.report, reload, distributed_part(optimizer)._adacons.exchange.load_state_dict


BINDINGS = {
    "horovod": over_horovod,
    "ddp": over_ddp,
    "tape": functools.partial(over_tape, False),
    "graph": functools.partial(over_tape, True),
    "keras": functools.partial(over_keras, "keras"),
    "tf_keras": functools.partial(over_keras, "tf_keras"),
}


# --- what is done with each


def train(binding: str, policy: str, schedule: str) -> dict[str, Any]:
    """Train through a sickness and out of it, with a checkpoint in its middle."""

    from adacons_hvd import Mean
    from adacons_hvd.insight import SickWorkers

    news: list[Any] = []
    aggregator = SickWorkers(Mean(), policy, news.append, averaging=0.9)
    make = BINDINGS[binding]
    at = np.zeros(60, np.float32)
    step, report, reload, *_ = make(aggregator, schedule, at)
    moved, seen = [], []
    try:
        for number in range(STEPS):
            if number == SAVED:
                step, report, *_ = reload(at)
            before, at = at, step(everyones(number)[harness.rank()])
            moved.append(before - at)
            seen.append(report().as_dict())
    except Exception as error:
        # Out of a graph of the user's, the same text comes as TensorFlow's error.
        if type(error).__name__ not in ("RuntimeError", "InvalidArgumentError"):
            raise
        return {"error": str(error), "at": len(moved), "where": hashlib.sha256(at.tobytes()).hexdigest()}
    told = [(w.rank, w.since, w.step, w.excluded, w.recovered) for w in news]
    return {"news": told, "moved": np.stack(moved), "seen": seen, "where": hashlib.sha256(at.tobytes()).hexdigest()}


#: Each policy's schedule.
POLICIES = {"warn": "two-pass", "exclude": "one-pass", "raise": "gather"}
#: Where each training makes two graphs, some of the policies; the other bindings take all.
SOME = {
    "tape": ("warn", "raise"),
    "graph": ("exclude", "raise"),  # there errors go a way of their own
    "keras": ("exclude",),
    "tf_keras": ("warn",),
}


def policies(binding: str) -> dict[str, Any]:
    """Train with each of the binding's policies."""
    return {policy: train(binding, policy, POLICIES[policy]) for policy in SOME.get(binding, POLICIES)}


def check(results: list[dict[str, Any]]) -> None:
    """Hold what all ranks found against the oracle."""
    for policy in results[0]:
        ranks = [result[policy] for result in results]
        assert len({rank["where"] for rank in ranks}) == 1
        first = ranks[0]
        if policy == "raise":
            assert {rank["at"] for rank in ranks} == {first["at"]}
            assert BEGIN < first["at"] < SAVED
            assert all(f"rank {SICK} looks sick since step" in rank["error"] for rank in ranks)
            continue
        for other in ranks[1:]:
            assert repr((other["news"], other["seen"])) == repr((first["news"], first["seen"]))
        (rank, since, began, excluded, _), (again, _, ended, _, recovered) = first["news"]
        assert (rank, again, excluded, recovered) == (SICK, SICK, policy == "exclude", True)
        assert BEGIN < since <= began < SAVED
        assert END < ended <= STEPS
        averages = insight_oracle.Averages(0.9)
        for number, (moved, report) in enumerate(zip(first["moved"], first["seen"], strict=True)):
            rows = everyones(number).astype(np.float64)
            sick = began <= number + 1 < ended
            assert report["sick"] == ([SICK] if sick else [])
            here = [i for i in range(WORKERS) if policy == "warn" or not (sick and i == SICK)]
            averages.add(rows[here])
            assert np.abs(moved / RATE - rows[here].mean(0)).max() < 1e-4, number
            assert report["present"] == [[i in here for i in range(WORKERS)]]
            assert report["norms"][0] == pytest.approx(np.linalg.norm(rows, axis=1), rel=1e-5)
            # Judged by those who were healthy before this step, which a schedule without the Gramian cannot tell apart.
            judges = [i for i in range(WORKERS) if policy == "warn" or not (began < number + 1 <= ended and i == SICK)]
            assert report["agreement"][0] == pytest.approx(insight_oracle.agreement(rows, judges), abs=1e-5)
            assert report["noise_scale"] == [pytest.approx(averages.noise_scale, rel=1e-3)]
            gain = insight_oracle.gain(averages.noise, averages.signal, len(here))
            assert report["adascale_gain"] == [pytest.approx(gain, rel=1e-3)]


@pytest.mark.ranks(WORKERS, launcher="mpi")
def test_over_horovod(cluster):
    check(cluster.run(policies, "horovod"))


@pytest.mark.ranks(WORKERS, launcher="torchrun")
def test_over_ddp(cluster):
    check(cluster.run(policies, "ddp"))


@pytest.mark.ranks(WORKERS, launcher="mpi", pool="tensorflow")
@pytest.mark.time_limit(240)
@pytest.mark.parametrize("binding", ["tape", "graph", "keras", "tf_keras"])
def test_with_tensorflow(cluster, binding):
    check(cluster.run(policies, binding))


@pytest.mark.ranks(WORKERS, launcher="mpi", **ON_TORCH)
def test_with_keras_on_torch(cluster):
    check(cluster.run(policies, "keras"))
