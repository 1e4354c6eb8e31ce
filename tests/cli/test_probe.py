"""`adacons probe` on real models, against the oracle."""

from __future__ import annotations

import numpy as np
import oracle
import pytest
from command import answer, assert_one_sentence

WORKERS, SIZE = 4, 3

#: Workers whose data is a function of their number alone, so that a test can have it, too.
LINEAR = """
import torch

def data(worker, size):
    generator = torch.Generator().manual_seed(worker)
    x = torch.randn(size, 5, generator=generator)
    return x, 3 + x.sum(1) * (1 + worker)

def loss(model, batch):
    x, y = batch
    return ((x @ model.weight[0] - y) ** 2).mean()

def make():
    model = torch.nn.Linear(5, 1, bias=False)
    torch.nn.init.constant_(model.weight, 0.5)
    return model, loss, data, torch.optim.SGD(model.parameters(), lr=0.01)
"""


def gradients(weight: np.ndarray) -> list[np.ndarray]:
    """Compute by hand what LINEAR's workers compute."""
    import torch

    found = []
    for worker in range(WORKERS):
        x = torch.randn(SIZE, 5, generator=torch.Generator().manual_seed(worker)).double().numpy()
        y = 3 + x.sum(1) * (1 + worker)
        found.append(2 * (x @ weight - y) @ x / SIZE)
    return found


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def test_against_the_oracle(tmp_path):
    """At the start, and after two steps that averaged."""
    (tmp_path / "linear.py").write_text(LINEAR)
    arguments = ["--workers", WORKERS, "--batch-sizes", SIZE, "--steps", "2,0", "--repeats", 2]
    found = answer("probe", "linear:make", *arguments, folder=tmp_path)
    assert (found["parameters"], found["optimizer"]) == (5, "SGD")
    weight = np.full(5, 0.5)
    for row, steps in zip(found["rows"], (0, 2), strict=True):
        for _ in range(steps):
            weight = weight - 0.01 * np.mean(gradients(weight), axis=0)
        now = gradients(weight)
        (psi,) = oracle.Grouped([[0]])([[g] for g in now])
        mean = np.mean(now, axis=0)
        assert (row["step"], row["workers"], row["batch_size"]) == (steps, WORKERS, SIZE)
        assert row["cosine"] == pytest.approx(cosine(psi, mean), abs=1e-5)
        # These workers always draw the same, so the reference is their mean.
        assert row["average_to_reference"] == pytest.approx(1, abs=1e-5)
        assert row["adacons_to_reference"] == pytest.approx(cosine(psi, mean), abs=1e-5)
        noise = sum(np.sum((g - mean) ** 2) for g in now) / (WORKERS - 1)
        signal = mean @ mean - noise / WORKERS
        if signal > 0:
            assert row["noise_scale"] == pytest.approx(SIZE * noise / signal, rel=1e-3)
        parts = [(g @ mean) / np.linalg.norm(g) for g in now]
        assert row["spread"] == pytest.approx(np.std(parts) / np.mean(parts), rel=1e-3)
    assert "differ" in found["verdict"]


KINDS = """
import torch

x = torch.randn(64, 5, generator=torch.Generator().manual_seed(0))
y = x.sum(1, keepdim=True)

def made(data, key=(0, 1)):
    model = torch.nn.Linear(5, 1)
    return model, lambda model, batch: (model(batch[key[0]]) - batch[key[1]]).square().mean(), data

def tensors(): return made((x, y))
def dataset(): return made(torch.utils.data.TensorDataset(x, y))
def loader(): return made(torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=7))
def once(): return made(iter([(x, y)]))
def same(): return made(lambda worker, size: {"x": x[:size], "y": y[:size]}, ("x", "y"))
def nothing(): return made(3)
def unconnected():
    model, loss, data = made((x, y))
    return model, lambda model, batch: 0 * loss(model, batch), data
def loss_fails():
    model, loss, data = made((x, y))
    return model, lambda model, batch: batch["x"], data
"""


# Without a framework, because tests of what fails before one is needed are then quick.
PLAIN = """
def three(): return 3
def fails(): raise OSError("no data\\nhere")
"""


@pytest.fixture(scope="module")
def kinds(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kinds")
    (folder / "kinds.py").write_text(KINDS)
    (folder / "plain.py").write_text(PLAIN)
    return folder


QUICK = ["--workers", 4, "--batch-sizes", 16, "--steps", 0, "--repeats", 1]


@pytest.mark.parametrize("entry", ["dataset", "loader"])
def test_any_kind_of_data(entry, kinds, here):
    (row,) = answer("probe", f"kinds:{entry}", *QUICK, folder=kinds, run=here)["rows"]
    assert 0 < row["spread"] < 1
    assert 0.8 < row["cosine"] < 1
    assert 0.5 < row["average_to_reference"] < 1 + 1e-6


def test_workers_with_equal_data_are_told_that_it_is_averaging(kinds, here):
    done = here("probe", "kinds:same", *QUICK, folder=kinds)
    assert done.returncode == 0, done.stderr
    assert "AdaCons would be averaging" in done.stdout
    assert "0°" in done.stdout


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ("kinds:once", ["ran out of batches"]),
        ("kinds:nothing", ["the data, a int", "function of (worker, size)"]),
        ("kinds:unconnected", ["zero"]),
        ("plain:three", ["must return a model"]),
        ("plain:fails", ["OSError: no data here"]),
        ("kinds:loss_fails", ["a gradient of your model failed"]),
        ("plain:missing", ["no function missing"]),
        ("elsewhere:make", ["no module elsewhere"]),
        ("plain", ["module:function"]),
    ],
)
def test_what_cannot_be_probed_is_said_in_one_sentence(entry, words, kinds, here):
    assert_one_sentence(here("probe", entry, *QUICK, folder=kinds), *words)


def test_more_than_the_memory_holds(kinds, here):
    arguments = ["--workers", 10**12, "--batch-sizes", 1, "--steps", 0]
    assert_one_sentence(here("probe", "kinds:tensors", *arguments, folder=kinds), "GB", "fewer --workers")


KERAS = """
import keras, numpy

def make():
    model = keras.Sequential([keras.Input((5,)), keras.layers.Dense(1, kernel_initializer="ones")])
    model.compile(keras.optimizers.SGD(0.01), loss="mse")
    x = numpy.random.default_rng(0).standard_normal((64, 5)).astype("float32")
    return model, (x, 3 + x[:, :1])
"""


def test_keras_is_the_same_on_both_backends(tmp_path):
    (tmp_path / "with_keras.py").write_text(KERAS)
    arguments = ["--workers", 4, "--batch-sizes", 16, "--steps", "0,3", "--repeats", 1]
    found = {
        backend: answer("probe", "with_keras:make", *arguments, folder=tmp_path, env={"KERAS_BACKEND": backend})
        for backend in ("tensorflow", "torch")
    }
    for one, other in zip(found["tensorflow"]["rows"], found["torch"]["rows"], strict=True):
        assert 0 < one["spread"] < 1
        assert one == pytest.approx(other, rel=1e-3)
    assert found["torch"]["parameters"] == found["tensorflow"]["parameters"] == 6
