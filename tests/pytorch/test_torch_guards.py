"""What only looks as if a rank trained alone is left in peace; and other mistakes are told in a sentence.

That a rank that does train alone is noticed, `tests/conformance` holds against every binding.
"""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.time_limit(120)


def distributed(model, **arguments):
    import torch

    import adacons_hvd.torch as hvd
    from adacons_hvd import AdaCons

    hvd.init()
    arguments.setdefault("aggregator", AdaCons())
    return hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.02), model.named_parameters(), **arguments)


@pytest.mark.ranks(3, launcher="mpi")
def test_what_is_no_fault_raises_nothing(cluster):
    """Steps on purpose, other optimizers for other parameters, wrappers around the distributed one."""

    def case():
        import harness
        import torch
        from torch_job import Batches, assert_equal_bits, loss_of, network

        import adacons_hvd.torch as hvd

        class Wrapper(torch.optim.Optimizer):
            """An optimizer that registers with PyTorch and takes its steps by the one within, every second time."""

            def __init__(self, inner):
                super().__init__(inner.param_groups, {})
                self.inner, self.count = inner, 0

            def step(self, closure=None):
                self.count += 1
                if self.count % 2 == 0:
                    self.inner.step()

        model, batches = network(), Batches()
        optimizer = distributed(model, check_replicas=1)
        wrapper = Wrapper(optimizer)
        for step in range(6):
            if step % 2 == 0:
                optimizer.zero_grad()
            loss_of(model, batches).backward()
            wrapper.step()
        assert_equal_bits(list(model.parameters()))

        # Another model of this rank alone, in the middle of a step.
        other, mine = network(1), distributed(network(2))
        alone = torch.optim.Adam(other.parameters())
        optimizer.zero_grad()
        loss_of(model, batches).backward()
        if harness.rank() == 0:
            loss_of(other, Batches()).backward()
            alone.step()
        optimizer.step()
        assert_equal_bits(list(model.parameters()))

        # Gradients of this rank alone, on purpose, on every rank; then equal again.
        optimizer.zero_grad()
        loss_of(model, batches).backward()
        with optimizer.skip_synchronize():
            optimizer.step()
        hvd.broadcast_parameters(model.state_dict(), root_rank=0)
        model.zero_grad()
        loss_of(model, batches).backward()
        optimizer.step()
        assert_equal_bits(list(model.parameters()))

        del mine

    cluster.run(case)


@pytest.mark.ranks(3, launcher="mpi")
def test_ranks_that_join_at_once_were_there_until_then(cluster):
    """A rank joins as soon as it has taken its last step, of which Horovod may still carry something."""

    def case():
        import random

        import harness
        import torch
        from torch_job import Batches, assert_equal_bits, loss_of, network

        import adacons_hvd.torch as hvd

        model, batches, chance = network(), Batches(), random.Random(3)
        optimizer = distributed(model, schedule="gather")
        for epoch in range(15):
            if epoch >= 10:
                model = network()
                optimizer = distributed(model, schedule="gather")
            steps = [chance.randint(1, 4) for _ in range(3)]
            for step in range(steps[harness.rank()]):
                optimizer.zero_grad()
                loss_of(model, batches).backward()
                optimizer.step()
                assert optimizer.report.present == [[step < length for length in steps]]
            if epoch >= 9:
                # What it has begun must have ended, too, though nobody holds it any more.
                del optimizer
            hvd.join()
            for number, p in enumerate(model.parameters()):
                hvd.broadcast_(p.data, root_rank=steps.index(max(steps)), name=f"parameter.{number}")
        assert_equal_bits(list(model.parameters()))
        return torch.isfinite(next(model.parameters())).all().item()

    assert cluster.run(case) == [True] * 3


@pytest.mark.ranks(2, launcher="mpi")
def test_sharded_parameters_are_refused_in_a_sentence(cluster):
    def case():
        import os

        import torch
        import torch.distributed as dist
        from torch.distributed.tensor import distribute_tensor, init_device_mesh

        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0", RANK="0", WORLD_SIZE="1")
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        try:
            mesh = init_device_mesh("cpu", (1,))
            model = torch.nn.Linear(4, 2)
            model.weight = torch.nn.Parameter(distribute_tensor(model.weight.detach(), mesh))
            with pytest.raises(TypeError, match=r"shape \(2, 4\) is a DTensor, as fully_shard\(\)"):
                distributed(model)
        finally:
            dist.destroy_process_group()

    cluster.run(case, fresh=True)


@pytest.mark.ranks(2, launcher="mpi")
def test_a_generators_backward_through_an_unfrozen_discriminator_is_told_the_cure(cluster):
    def case():
        from torch_job import Batches, loss_of, network

        model = network()
        optimizer = distributed(model)
        loss_of(model, Batches()).backward()
        with pytest.raises(AssertionError, match=r"a GAN's generator.*requires_grad_\(False\)"):
            optimizer.zero_grad()
        optimizer.step()

    cluster.run(case)


@pytest.mark.ranks(2, launcher="mpi")
def test_an_aggregator_with_weights_of_the_wrong_length_is_named(cluster):
    def case():
        from torch_job import Batches, loss_of, network

        from adacons_hvd import Aggregator

        class Short(Aggregator):
            def weights(self, statistics):
                return statistics.norms[..., :1]

        model = network()
        optimizer = distributed(model, aggregator=Short())
        loss_of(model, Batches()).backward()
        with pytest.raises(ValueError, match=r"Short\(\) returned weights of shape \(1, 1\).*\(1, 2\)"):
            optimizer.step()

    cluster.run(case)
