"""Checkpoints: plain, versioned, exact when resumed from, and refused where they are not what they say."""

from __future__ import annotations

import copy
import pickle

import pytest

pytestmark = [pytest.mark.ranks(3, launcher="gloo"), pytest.mark.time_limit(120)]


class Training:
    """A model, its optimizer and its data, on one rank."""

    def __init__(self, aggregator=None, granularity="model"):
        import harness
        import torch

        import adacons_hvd.torch as hvd
        from adacons_hvd import AdaCons

        hvd.init()
        torch.manual_seed(0)
        self.model = torch.nn.Linear(5, 3)
        self.optimizer = hvd.DistributedOptimizer(
            torch.optim.Adam(self.model.parameters(), lr=0.01),
            self.model.named_parameters(),
            aggregator=aggregator or AdaCons(),
            granularity=granularity,
        )
        self.draw = torch.Generator().manual_seed(harness.rank())

    def steps(self, count):
        import torch

        for _ in range(count):
            self.optimizer.zero_grad()
            x = torch.randn(8, 5, generator=self.draw)
            (self.model(x) - 4 - x.sum(1, keepdim=True)).square().mean().backward()
            self.optimizer.step()

    def state(self):
        # A copy, because load_state_dict() lets two optimizers share their step counters.
        return copy.deepcopy(
            {
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "draw": self.draw.get_state(),
            }
        )

    def load(self, state):
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.draw.set_state(state["draw"])

    def end(self):
        """The parameters, after making sure that they are everyone's."""
        import harness

        parameters = [p.tolist() for p in self.model.parameters()]
        everyone = harness.gather(parameters)
        assert all(theirs == parameters for theirs in everyone)
        return parameters


def test_a_full_disk_loses_a_checkpoint_and_nothing_else(cluster, tmp_path):
    def case(folder):
        import resource
        from pathlib import Path

        import harness
        import torch

        def save(training, name):
            torch.save(training.state(), Path(folder) / f"{name}.{harness.rank()}")

        training, undisturbed = Training(), Training()
        training.steps(3)
        save(training, "first")
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))  # bytes, for every file
        try:
            with pytest.raises((RuntimeError, OSError)):
                save(training, "second")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        training.steps(3)
        save(training, "third")
        undisturbed.steps(6)
        assert training.end() == undisturbed.end()
        resumed = Training()
        for name in ("first", "third"):
            resumed.load(torch.load(Path(folder) / f"{name}.{harness.rank()}", weights_only=True))
        training.steps(2)
        resumed.steps(2)
        assert training.end() == resumed.end()

    cluster.run(case, str(tmp_path))


def test_a_truncated_file_is_refused_and_training_goes_on(cluster, tmp_path):
    def case(folder):
        from pathlib import Path

        import harness
        import torch

        training, undisturbed = Training(), Training()
        training.steps(3)
        path = Path(folder) / f"checkpoint.{harness.rank()}"
        torch.save(training.state(), path)
        whole = path.read_bytes()
        for length in (0, 1, 100, len(whole) // 2, len(whole) - 1):
            path.write_bytes(whole[:length])
            with pytest.raises((RuntimeError, EOFError, OSError, pickle.UnpicklingError)):
                training.load(torch.load(path, weights_only=True))
        training.steps(3)
        undisturbed.steps(6)
        assert training.end() == undisturbed.end()

    cluster.run(case, str(tmp_path))


def test_states_of_other_configurations_are_taken_up_as_far_as_they_go(cluster):
    """Another momentum, another aggregator, fewer things remembered: counters stay, the rest starts afresh."""

    def case():
        import torch

        from adacons_hvd import AdaCons, Mean

        ends = []
        for before, after in (
            ({"aggregator": AdaCons(momentum=0)}, {"aggregator": AdaCons()}),
            ({"aggregator": AdaCons()}, {"aggregator": AdaCons(momentum=0)}),
            ({"aggregator": Mean()}, {"aggregator": AdaCons()}),
            ({"aggregator": AdaCons()}, {"aggregator": Mean()}),
            ({"aggregator": AdaCons(momentum=0.9)}, {"aggregator": AdaCons(momentum=0.5, normalize=False)}),
        ):
            first, second = Training(**before), Training(**after)
            first.steps(3)
            second.load(first.state())
            second.steps(3)
            second.end()
            assert all(torch.isfinite(v).all() for v in second.optimizer._reducer.state.tensors().values())
            ends.append(second.optimizer.report.steps)
        layers, model = Training(granularity="layer"), Training()
        layers.steps(3)
        model.load(layers.state())
        with pytest.warns(UserWarning, match="state is for 2 groups of parameters and there are 1 now"):
            model.steps(1)
        model.end()
        return ends, model.optimizer.report.steps

    assert cluster.run(case) == [([6] * 5, 1)] * 3
