"""Wrong arguments are refused in one sentence, the same one in all three Kerases."""

from __future__ import annotations

from typing import Any

import pytest
from harness.launchers import KERAS_2, ON_TORCH
from keras_job import compiled

pytestmark = pytest.mark.time_limit(240)

SCHEDULES = "auto, fast, two-pass, one-pass, gather, half, sketch, or a Network"

#: Arguments, and the sentence that refuses them. ``v`` are a model's variables, ``hvd`` and ``AdaCons`` what they are.
WRONG = {
    "dict(aggregator='AdaCons')": "aggregator must be an Aggregator such as AdaCons(), got 'AdaCons'",
    "dict(aggregator=AdaCons(), schedule=['gather'])": f"schedule must be one of {SCHEDULES}, got ['gather']",
    "dict(schedule='one-pas')": f"schedule must be one of {SCHEDULES}, got 'one-pas'",
    "dict(granularity=None)": "granularity must be lists of parameters, got None",
    "dict(granularity=4)": "granularity must be lists of parameters, got 4",
    "dict(granularity='tensor')": 'granularity must be "model", "layer" or lists of parameters, got \'tensor\'',
    "dict(granularity=[v[0]])": "granularity must be lists of parameters, found Variable in place of a list",
    "dict(granularity=[['kernel']])": "granularity must hold parameters, found str",
    "dict(granularity=[[v[0]], [v[0]]])": "a parameter of shape (6, 5) is in granularity twice",
    "dict(groups=-1)": "groups must not be negative, got -1",
    "dict(groups='all')": "groups must be lists of parameters, got 'all'",
    "dict(compression=True)": "compression must be a compressor such as Compression.fp16, with compress() and "
    "decompress(), got True",
    "dict(process_set=3)": "process_set must be a ProcessSet such as hvd.add_process_set([0, 1]), got 3",
    "dict(bucket_bytes=0)": "bucket_bytes must be a positive whole number, got 0",
    "dict(backward_passes_per_step=1.5)": "backward_passes_per_step must be a positive whole number, got 1.5",
    "dict(backward_passes_per_step=0)": "backward_passes_per_step must be a positive whole number, got 0",
    "dict(gradient_predivide_factor=0)": "gradient_predivide_factor must be a positive number, got 0",
    "dict(check_replicas=-1)": "check_replicas must be a whole number of steps, or 0 to compare replicas never, got -1",
    "dict(check_replicas=True)": "check_replicas must be a whole number of steps, or 0 to compare replicas never, "
    "got True",
    "dict(may_differ=[1])": "may_differ must hold parameters, found int",
    "dict(may_differ=v[0])": "may_differ must be lists of parameters, found Variable in place of a list",
    "dict(workers='host')": 'workers="host" is for PyTorch over Horovod and for DDP; leave workers out here',
    "dict(optimizer='adam')": "optimizer must be an optimizer of Keras such as keras.optimizers.Adam(), got 'adam'",
    "dict(optimizer=None)": "optimizer must be an optimizer of Keras such as keras.optimizers.Adam(), got None",
}


def refuse() -> list[str]:
    from keras_job import keras_and_hvd

    from adacons_hvd import AdaCons

    keras, hvd = keras_and_hvd()
    names = {"v": compiled(keras, None).trainable_variables, "hvd": hvd, "AdaCons": AdaCons}
    messages = []
    for text in WRONG:
        arguments: dict[str, Any] = {"optimizer": keras.optimizers.SGD(0.01), **eval(text, dict(names))}
        with pytest.raises((TypeError, ValueError)) as caught:
            hvd.DistributedOptimizer(**arguments)
        messages.append(str(caught.value).replace("ResourceVariable", "Variable"))
    with pytest.raises(ValueError, match="local_layers must hold Keras layers, found int"):
        hvd.PartialDistributedOptimizer(keras.optimizers.SGD(0.01), local_layers=[3])
    return messages


def foreign_parameters() -> str:
    """Granularity that names variables of another model is refused in the first step."""
    from keras_job import fit, keras_and_hvd

    from adacons_hvd import AdaCons

    keras, hvd = keras_and_hvd()
    other = compiled(keras, None)
    optimizer = hvd.DistributedOptimizer(
        keras.optimizers.SGD(0.01), aggregator=AdaCons(), granularity=[other.trainable_variables[:1]]
    )
    with pytest.raises(ValueError, match="granularity names") as caught:
        fit(compiled(keras, optimizer))
    return str(caught.value)


class Arguments:
    def test_wrong_arguments(self, cluster):
        for messages in cluster.run(refuse):
            assert dict(zip(WRONG, messages, strict=True)) == WRONG


class Members:
    """Not with Keras 2, whose variables do not tell whether they are trained."""

    def test_parameters_of_another_model(self, cluster):
        for message in cluster.run(foreign_parameters):
            assert "1 parameter that this optimizer does not train, the first of shape (6, 5)" in message


@pytest.mark.ranks(2, launcher="gloo", pool="tensorflow")
class TestOnTensorFlow(Arguments, Members): ...


@pytest.mark.ranks(2, launcher="gloo", **ON_TORCH)
class TestOnTorch(Arguments, Members): ...


@pytest.mark.ranks(2, launcher="gloo", **KERAS_2)
class TestOfKeras2(Arguments): ...
