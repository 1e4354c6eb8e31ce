"""A rank that trains alone is noticed, whatever path led to it, and every rank gets the same error."""

from __future__ import annotations

import pytest

pytestmark = [pytest.mark.ranks(3, launcher=("mpi", "gloo")), pytest.mark.time_limit(120)]


def distributed(model, **arguments):
    import torch

    import adacons_hvd.torch as hvd
    from adacons_hvd import AdaCons

    hvd.init()
    arguments.setdefault("aggregator", AdaCons())
    base = torch.optim.SGD(model.parameters(), lr=0.02)
    kept = base.step  # as a profiler or a trainer may keep it
    return hvd.DistributedOptimizer(base, model.named_parameters(), **arguments), kept


def foreign_step(optimizer, model, kept):
    """The optimizer's own step, which something kept from before."""
    kept()


def step_of_the_class(optimizer, model, kept):
    import torch

    torch.optim.SGD.step(optimizer)


def plain_optimizer(optimizer, model, kept):
    """Another optimizer of the same parameters."""
    import torch

    torch.optim.Adam(model.parameters()).step()


def compiled_step(optimizer, model, kept):
    """The optimizer's own step, compiled."""
    import torch

    torch.compile(kept, backend="eager")()


STRAYS = {
    "foreign step": (foreign_step, r"something called SGD.step\(\) instead of the distributed optimizer's step"),
    "step of the class": (step_of_the_class, r"something called SGD.step\(\)"),
    "plain optimizer": (plain_optimizer, "Adam, an optimizer that is not distributed, was used for parameters of"),
    "compiled step": (compiled_step, r"something called SGD.step\(\)"),
}


def train_until(error, pattern, stray, ranks, *, steps=4, schedule="auto", **arguments):
    """Train; after two good steps some ranks stray. Every rank must end with the same error."""
    import harness
    from torch_job import Batches, assert_equal_bits, loss_of, network

    model, batches = network(), Batches()
    optimizer, kept = distributed(model, schedule=schedule, **arguments)

    def train():
        for step in range(steps):
            optimizer.zero_grad()
            loss_of(model, batches).backward()
            if step >= 2 and harness.rank() in ranks:
                stray(optimizer, model, kept)
            else:
                optimizer.step()
            if step < 2:
                assert_equal_bits(list(model.parameters()))

    with pytest.raises(error, match=pattern) as caught:
        train()
    messages = harness.gather(str(caught.value))
    assert len(set(messages)) == 1, messages
    return messages[0], optimizer, model


@pytest.mark.parametrize("schedule", ["gather", "one-pass"])
@pytest.mark.parametrize("way", STRAYS)
def test_a_step_that_was_not_aggregated_stops_every_rank(cluster, way, schedule):
    def case():
        import harness
        from torch_job import Batches, assert_equal_bits, loss_of

        import adacons_hvd.torch as hvd
        from adacons_hvd.engine.replicas import StrayStepError

        stray, pattern = STRAYS[way]
        for ranks, named in (([1], "rank 1 took"), ([0, 1, 2], "ranks 0-2 took")):
            message, optimizer, model = train_until(StrayStepError, pattern, stray, ranks, schedule=schedule)
            assert named in message, message
        # Nothing is left under way: once parameters are equal again, training can go on.
        hvd.broadcast_parameters(model.state_dict(), root_rank=0)
        model.zero_grad()
        loss_of(model, Batches(harness.rank())).backward()
        optimizer.step()
        assert_equal_bits(list(model.parameters()))

    cluster.run(case)


def local_change(optimizer, model, kept):
    """A parameter is changed between two steps, as by averaging weights or clipping them on one rank."""
    import torch

    optimizer.step()
    with torch.no_grad():
        next(model.parameters())[0, 0] += 1e-6


def local_step_on_purpose(optimizer, model, kept):
    with optimizer.skip_synchronize():
        optimizer.step()


def test_replicas_that_have_drifted_apart_stop_every_rank(cluster):
    def case():
        from adacons_hvd.engine.replicas import ReplicaError

        message, *_ = train_until(
            ReplicaError, "the replicas have drifted apart", local_change, [1], steps=8, check_replicas=2
        )
        assert "rank 1 held other values than ranks 0, 2 in 1 of 6 parameters: 0.weight." in message
        return message

    cluster.run(case)


def test_parameters_that_were_never_made_equal_are_found_in_the_third_step(cluster):
    """By default; and the check can be switched off, or a parameter left out of it."""

    def case():
        import harness
        import torch
        from torch_job import Batches, loss_of, network

        from adacons_hvd.engine.replicas import CHECK_REPLICAS, ReplicaError

        def train(steps=4, leave_out=False, **arguments):
            model, batches = network(), Batches()
            first = next(model.parameters())
            if harness.rank() == 2:
                with torch.no_grad():
                    first += 1
            may_differ = [first] if leave_out else []
            optimizer, _ = distributed(model, may_differ=may_differ, **arguments)
            for step in range(steps):
                optimizer.zero_grad()
                loss_of(model, batches).backward()
                try:
                    optimizer.step()
                except ReplicaError as error:
                    return step, str(error)
            return steps, optimizer._reducer.settings.check_replicas

        found = train()
        return (
            found[0],
            "rank 2 held" in found[1],
            train(check_replicas=0),
            train(leave_out=True) == (4, CHECK_REPLICAS),
        )

    assert cluster.run(case) == [(2, True, (4, 0), True)] * 3


@pytest.mark.ranks(3, launcher="mpi")
def test_what_is_no_fault_raises_nothing(cluster):
    """Steps on purpose, other optimizers for other parameters, wrappers around the distributed one, joined ranks."""

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
        optimizer, _ = distributed(model, check_replicas=1)
        wrapper = Wrapper(optimizer)
        for step in range(6):
            if step % 2 == 0:
                optimizer.zero_grad()
            loss_of(model, batches).backward()
            wrapper.step()
        assert_equal_bits(list(model.parameters()))

        # Another model of this rank alone, in the middle of a step.
        other, (mine, _) = network(1), distributed(network(2))
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

        # A rank that has joined stays behind, and comes back.
        for _ in range(2):
            for _ in range(4 if harness.rank() else 2):
                optimizer.zero_grad()
                loss_of(model, batches).backward()
                optimizer.step()
            hvd.join()
            hvd.broadcast_parameters(model.state_dict(), root_rank=1)
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
        optimizer, _ = distributed(model, schedule="gather")
        for epoch in range(15):
            if epoch >= 10:
                model = network()
                optimizer, _ = distributed(model, schedule="gather")
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
        optimizer, _ = distributed(model)
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
        optimizer, _ = distributed(model, aggregator=Short())
        loss_of(model, Batches()).backward()
        with pytest.raises(ValueError, match=r"Short\(\) returned weights of shape \(1, 1\).*\(1, 2\)"):
            optimizer.step()

    cluster.run(case)


@pytest.mark.ranks(2, launcher="mpi")
def test_a_rank_without_an_aggregator_is_told_so_in_one_line(cluster):
    def case():
        import harness
        from torch_job import Batches, loss_of, network

        from adacons_hvd import AdaCons
        from adacons_hvd.agreement import DisagreementError

        model = network()
        optimizer, _ = distributed(model, aggregator=AdaCons() if harness.rank() else None)
        loss_of(model, Batches()).backward()
        with pytest.raises(DisagreementError) as caught:
            optimizer.step()
        return str(caught.value).splitlines()[1:-1]

    for lines in cluster.run(case, fresh=True):
        assert len(lines) == 1, lines
        assert "aggregator: None (Horovod's own reduction) on rank 0; AdaCons(" in lines[0]
