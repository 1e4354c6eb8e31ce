"""Keras' optimizers, callbacks and options of ``compile``, as scripts use them: ranks end with equal weights."""

from __future__ import annotations

from typing import Any

import pytest
from harness.launchers import KERAS_2, ON_TORCH
from keras_job import compiled, distributed, fit

pytestmark = pytest.mark.time_limit(240)

#: Every optimizer of Keras 3, and of Keras 2.
OPTIMIZERS = {
    "Adadelta": "Adadelta(0.1)",
    "Adafactor": "Adafactor(0.01)",
    "Adagrad": "Adagrad(0.01)",
    "Adam": "Adam(0.01, amsgrad=True)",
    "Adamax": "Adamax(0.01)",
    "AdamW": "AdamW(0.01)",
    "Ftrl": "Ftrl(0.01)",
    "Lion": "Lion(0.01)",
    "Nadam": "Nadam(0.01)",
    "RMSprop": "RMSprop(0.01, centered=True)",
    "SGD": "SGD(0.01, momentum=0.9, nesterov=True)",
}
OF_KERAS_3 = {
    **OPTIMIZERS,
    "LossScaleOptimizer": "LossScaleOptimizer(SGD(0.01), initial_scale=64.0)",
    "MultiOptimizer": "MultiOptimizer(OptimizerMap(SGD(0.01), {'.*bias': Adam(0.01)}))",
    "Muon": "Muon(0.01, exclude_layers=['nothing'])",
    "ScheduleFreeAdamW": "ScheduleFreeAdamW(0.01)",
}
OF_KERAS_2 = {
    **OPTIMIZERS,
    **{f"legacy {name}": f"legacy.{name}(0.01)" for name in ("Adam", "Adagrad", "Ftrl", "RMSprop", "SGD")},
}

#: Options of ``compile``, all at once. Keras itself refuses ``steps_per_execution`` on PyTorch. That ``jit_compile`` is
#: switched off has a test of its own, and ``run_eagerly`` is used all over these tests.
OPTIONS = {"metrics": ["mae"], "weighted_metrics": ["mse"], "steps_per_execution": 2}
OPTIONS_OF_KERAS_3 = {**OPTIONS, "auto_scale_loss": False}
OPTIONS_ON_TORCH = {name: value for name, value in OPTIONS_OF_KERAS_3.items() if name != "steps_per_execution"}


def asked_as_on_a_gpu(keras: Any, model: Any) -> None:
    """Where "auto" means yes."""
    model._resolve_auto_jit_compile = lambda: True
    model.compile(model.optimizer, loss="mse", jit_compile="auto")


#: Ways to make a model train with ``jit_compile=True``, one after the other; the second one while it trains.
JIT = {
    "set before": lambda keras, model: setattr(model, "jit_compile", True),
    "set later": lambda keras, model: setattr(model, "jit_compile", True),
    "compile": lambda keras, model: model.compile(model.optimizer, loss="mse", jit_compile=True),
    "compile_from_config": lambda keras, model: model.compile_from_config(
        {**model.get_compile_config(), "jit_compile": True}
    ),
}
JIT_OF_KERAS_3 = {**JIT, "auto": asked_as_on_a_gpu}


#: Optimizers that are made of others, which take their steps while the distributed one does. Only these are tried with
#: an aggregator and in a graph: an average without one takes less time, and goes the same way.
MADE_OF_OTHERS = ("LossScaleOptimizer", "MultiOptimizer")


def train_with_optimizers(expressions: dict[str, str]) -> list[str]:
    """Train by each of them; the names of those whose ranks ended alike."""
    from keras_job import assert_equal_bits, data, keras_and_hvd

    from adacons_hvd import AdaCons

    keras, hvd = keras_and_hvd()
    names = {name: getattr(keras.optimizers, name) for name in dir(keras.optimizers)}
    for name, expression in expressions.items():
        if expression.split("(")[0] not in names and not expression.startswith("legacy"):
            continue  # of another version of Keras
        try:
            made_of_others = name in MADE_OF_OTHERS
            aggregator = AdaCons() if made_of_others else None
            optimizer = hvd.DistributedOptimizer(
                eval(expression, dict(names)), aggregator=aggregator, schedule="two-pass", check_replicas=0
            )
            model = compiled(keras, optimizer, run_eagerly=not made_of_others)
            before = model.get_weights()
            for _ in range(2):
                model.train_on_batch(*data(8))
        except Exception as error:
            raise AssertionError(f"failed with {name}") from error
        assert_equal_bits(model, optimizer)
        assert any((old != new).any() for old, new in zip(before, model.get_weights(), strict=True)), name
    return list(expressions)


def train_with_options(options: dict[str, Any]) -> None:
    """Train and evaluate with these options."""
    from keras_job import assert_equal_bits, data, keras_and_hvd

    keras, hvd = keras_and_hvd()
    model = fit(compiled(keras, distributed(keras, hvd, False), **options), 4)
    model.evaluate(*data(16), batch_size=8, verbose=0)
    assert_equal_bits(model, model.optimizer)


def train_with_jit(ways: dict[str, Any], folder: str) -> list[str]:
    """Train a model that is to be compiled, whichever way it was told so; the messages."""
    import warnings

    import harness
    from keras_job import assert_equal_bits, data, keras_and_hvd

    keras, hvd = keras_and_hvd()
    path = f"{folder}/{harness.rank()}.keras"
    plain = compiled(keras, keras.optimizers.SGD(0.01), jit_compile=True)
    plain.save(path)
    messages = []

    def train(model: Any) -> None:
        assert model.jit_compile
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            if len(messages) % 2:
                fit(model, 2)
            else:
                model.train_on_batch(*data(8))
        (told,) = (str(w.message) for w in caught if "jit_compile" in str(w.message))
        messages.append(told)
        assert_equal_bits(model, model.optimizer)
        assert not model.jit_compile

    model = compiled(keras, distributed(keras, hvd, False))
    for ask in ways.values():
        ask(keras, model)
        train(model)
    train(hvd.load_model(path))
    assert plain.jit_compile, "a model without a distributed optimizer is none of our business"
    return messages


def train_compiled() -> list[bool]:
    """Train by a step that the user has compiled, by ``torch.compile``; whether our part of it was compiled, too."""
    import torch
    from keras_job import assert_equal_bits, data, keras_and_hvd

    keras, hvd = keras_and_hvd()
    model = compiled(keras, distributed(keras, hvd))
    exchange = model.optimizer._adacons.exchange
    x, y = (torch.from_numpy(array) for array in data(8))
    reduce, ours = exchange.reduce, []

    def watched(*arguments: Any) -> Any:
        ours.append(torch.compiler.is_compiling())
        return reduce(*arguments)

    exchange.reduce = watched

    @torch.compile(backend="eager")
    def step() -> None:
        model.zero_grad()
        variables = model.trainable_variables
        # The model by hand, because compiling Keras' layers takes most of the time and is not ours.
        kernel, bias, *head = (v.value for v in variables)
        (torch.addmm(head[1], torch.tanh(torch.addmm(bias, x, kernel)), head[0]) - y).square().mean().backward()
        with torch.no_grad():
            model.optimizer.apply([v.value.grad for v in variables], variables)

    for _ in range(3):
        step()
    assert_equal_bits(model, model.optimizer)
    assert model.optimizer.report.steps == 3
    compiled_by_torch = torch.nn.Linear(2, 2)
    compiled_by_torch.compile(backend="eager")  # torch.nn.Module's own, whatever Keras calls compile
    assert torch.isfinite(compiled_by_torch(torch.ones(1, 2))).all()
    return ours


def replaced() -> int:
    """Another optimizer is assigned to a model that has trained, without compiling it anew."""
    from keras_job import assert_equal_bits, keras_and_hvd

    keras, hvd = keras_and_hvd()
    # An optimizer is distributed only once a model has been compiled with it.
    plain = keras.optimizers.SGD(0.01)
    model = compiled(keras, plain)
    hvd.DistributedOptimizer(plain)
    assert_equal_bits(fit(model))
    model.optimizer = distributed(keras, hvd)
    assert_equal_bits(fit(model))
    steps: int = model.optimizer.report.steps
    return steps


def train_with_callbacks(folder: str) -> list[str]:
    """Train with all of Keras' callbacks that touch the optimizer, the weights or the course of training."""
    import harness
    from keras_job import assert_equal_bits, keras_and_hvd

    from adacons_hvd.keras.binding import distributed_part

    keras, hvd = keras_and_hvd()
    callbacks = keras.callbacks
    mine = f"{folder}/{harness.rank()}"
    average = hvd.callbacks.MetricAverageCallback
    lists = {
        # What they decide by is averaged, so that all ranks decide alike.
        "ReduceLROnPlateau": lambda: [average(), callbacks.ReduceLROnPlateau("loss", patience=1, min_delta=10.0)],
        "EarlyStopping": lambda: [
            average(),
            callbacks.EarlyStopping("loss", patience=1, min_delta=10.0, restore_best_weights=True),
        ],
    }
    if hasattr(callbacks, "SwapEMAWeights"):
        lists["SwapEMAWeights"] = lambda: [callbacks.SwapEMAWeights()]
    # Last, because Keras 2 fits no model again after BackupAndRestore.
    lists["what looks on"] = lambda: [
        callbacks.LearningRateScheduler(lambda epoch, rate: rate * 0.5),
        callbacks.ModelCheckpoint(f"{mine}.keras", monitor="loss"),
        callbacks.ModelCheckpoint(f"{mine}.weights.h5", save_weights_only=True, monitor="loss"),
        callbacks.TerminateOnNaN(),
        callbacks.BackupAndRestore(f"{mine}.backup"),
        callbacks.CSVLogger(f"{mine}.csv"),
        callbacks.History(),
        callbacks.ProgbarLogger(),
        callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: None),
    ]
    ema = {"use_ema": True, "ema_momentum": 0.5} if "SwapEMAWeights" in lists else {}
    optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(0.01, **ema))
    model = compiled(keras, optimizer, run_eagerly=True)
    for make in lists.values():
        fit(model, 2, epochs=3, callbacks=make())
        assert_equal_bits(model, optimizer)
        assert distributed_part(model.optimizer) is optimizer
    return list(lists)


CALLBACKS_OF_KERAS_2 = ["ReduceLROnPlateau", "EarlyStopping", "what looks on"]
CALLBACKS = ["ReduceLROnPlateau", "EarlyStopping", "SwapEMAWeights", "what looks on"]


class Scripts:
    optimizers = OF_KERAS_3
    options = OPTIONS_OF_KERAS_3
    jit = JIT_OF_KERAS_3
    callbacks = CALLBACKS

    def test_optimizers(self, cluster):
        assert cluster.run(train_with_optimizers, self.optimizers) == [list(self.optimizers)] * 2

    def test_options_of_compile(self, cluster):
        cluster.run(train_with_options, self.options)

    def test_jit_compile_is_switched_off_whatever_asks_for_it(self, cluster, tmp_path):
        for messages in cluster.run(train_with_jit, self.jit, str(tmp_path)):
            assert len(messages) == len(self.jit) + 1
            assert all(message.endswith("trains with jit_compile=False") for message in messages)

    def test_an_optimizer_that_takes_the_place_of_another(self, cluster):
        assert cluster.run(replaced) == [3] * 2

    def test_callbacks(self, cluster, tmp_path):
        assert cluster.run(train_with_callbacks, str(tmp_path)) == [self.callbacks] * 2


@pytest.mark.ranks(2, launcher="gloo", pool="tensorflow")
class TestOnTensorFlow(Scripts): ...


@pytest.mark.ranks(2, launcher="gloo", **ON_TORCH)
class TestOnTorch(Scripts):
    options = OPTIONS_ON_TORCH

    def test_a_step_compiled_by_the_user(self, cluster):
        assert cluster.run(train_compiled) == [[False] * 3] * 2


@pytest.mark.ranks(2, launcher="gloo", **KERAS_2)
class TestOfKeras2(Scripts):
    optimizers = OF_KERAS_2
    options = OPTIONS
    jit = JIT
    callbacks = CALLBACKS_OF_KERAS_2
