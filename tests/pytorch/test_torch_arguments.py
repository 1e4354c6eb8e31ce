"""Every argument of Horovod's DistributedOptimizer keeps its meaning under an aggregator."""

from __future__ import annotations

import pytest
from harness.launchers import PROCESS_SETS

pytestmark = [pytest.mark.ranks(3, launcher="mpi"), pytest.mark.time_limit(120)]


def wrapped(model, learning_rate=0.02, **arguments):
    import torch

    import adacons_hvd.torch as hvd
    from adacons_hvd import AdaCons

    hvd.init()
    arguments.setdefault("aggregator", AdaCons())
    arguments.setdefault("named_parameters", model.named_parameters())
    return hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=learning_rate), **arguments)


def run_case(tolerance=1e-5, transform=None, passes=1, settings=None, **arguments):
    """Train a small network with these arguments against the oracle."""
    from torch_job import Batches, compare, loss_of, network

    model, batches = network(), Batches()
    optimizer = wrapped(model, **arguments)

    def backward(_):
        for _ in range(passes):
            loss_of(model, batches).backward()

    compare(
        optimizer,
        list(model.parameters()),
        backward,
        tolerance=tolerance,
        transform=transform,
        settings=settings,
    )
    return optimizer


def wire_types(optimizer):
    return {str(packing.bucket.buffer.dtype) for packing in optimizer._reducer._packings}


@pytest.mark.parametrize("schedule", ["two-pass", "one-pass", "gather"])
def test_fp16_compression_sends_halves_and_weighs_what_was_sent(cluster, schedule):
    def case():
        import numpy as np
        from horovod.torch import Compression

        def half(x):
            return x.astype(np.float16).astype(np.float64)

        # Two roundings to half precision, 2**-11 each, on the way back.
        optimizer = run_case(tolerance=2e-3, transform=half, compression=Compression.fp16, schedule=schedule)
        return wire_types(optimizer)

    assert cluster.run(case) == [{"torch.float16"}] * 3


def test_fp16_compression_keeps_the_digits_of_short_results(cluster):
    """A unit-length result can have entries that half precision rounds to nothing."""

    def case():
        import harness
        import numpy as np
        import oracle
        import torch
        from torch_job import Batches, array

        weight = torch.nn.Parameter(torch.zeros(1000))
        optimizer = wrapped(torch.nn.ParameterList([weight]), compression=hvd_compression(), schedule="one-pass")
        gradient = 0.1 * (1 + 0.3 * Batches()(1000))
        gradient[0] = 60_000.0  # beside which the rest of a unit vector is some 1e-6
        (weight @ gradient).backward()
        sent = array(weight.grad.half(), weight)
        optimizer.synchronize()
        expected = oracle.Oracle()(harness.gather(sent))[1:]
        assert oracle.error([array(weight.grad, weight)[1:]], [expected]) < 1e-3
        assert np.abs(expected).max() < 1e-5

    def hvd_compression():
        from horovod.torch import Compression

        return Compression.fp16

    cluster.run(case)


def test_a_compressor_of_ones_own_is_applied_and_undone(cluster):
    def case():
        import numpy as np
        import torch

        class Coarse:
            """Keep multiples of 1/8, sent as whole numbers."""

            @staticmethod
            def compress(tensor):
                return torch.round(tensor * 8), None

            @staticmethod
            def decompress(tensor, ctx):
                return tensor / 8

        run_case(transform=lambda x: np.round(x.astype(np.float32) * 8) / 8.0, compression=Coarse)

    cluster.run(case)


def test_nothing_leaves_before_the_announced_passes(cluster):
    def case():
        from torch_job import Batches, loss_of, network

        model, batches = network(), Batches()
        optimizer = wrapped(model, backward_passes_per_step=2, schedule="two-pass")
        for _ in range(2):  # the first step lays out the buckets
            optimizer.zero_grad()
            loss_of(model, batches).backward()
            before = [packing.bucket.begun for packing in optimizer._reducer._packings]
            loss_of(model, batches).backward()
            after = [packing.bucket.begun for packing in optimizer._reducer._packings]
            optimizer.step()
        optimizer.set_backward_passes_per_step(1)
        optimizer.zero_grad()
        loss_of(model, batches).backward()
        at_once = [packing.bucket.begun for packing in optimizer._reducer._packings]
        optimizer.step()
        return before, after, at_once

    assert cluster.run(case) == [([False], [True], [True])] * 3


def test_gradient_predivide_factor_protects_sums_from_overflow(cluster):
    def case():
        import torch
        from torch_job import assert_equal_bits

        weight = torch.nn.Parameter(torch.zeros(8, dtype=torch.float16))
        optimizer = wrapped(torch.nn.ParameterList([weight]), schedule="two-pass", gradient_predivide_factor=8.0)
        (weight * 40_000).sum().backward()  # three of these exceed 65,504
        optimizer.step()
        assert not optimizer.report.fell_back[0]
        assert torch.isfinite(weight).all()
        assert_equal_bits([weight])

    cluster.run(case)


@pytest.mark.parametrize("groups", [None, 2, 4])
def test_groups_as_a_number_make_that_many_buckets(cluster, groups):
    def case():
        from torch_job import Batches, compare, loss_of, network

        model, batches = network(), Batches()
        optimizer = wrapped(model, groups=groups)
        compare(optimizer, list(model.parameters()), lambda _: loss_of(model, batches).backward())
        return len(optimizer._reducer._packings)

    assert cluster.run(case) == [groups or 1] * 3


def test_groups_as_lists_travel_together_and_the_rest_alone(cluster):
    def case():
        from torch_job import Batches, compare, loss_of, network

        model, batches = network(), Batches()
        parameters = list(model.parameters())
        optimizer = wrapped(model, groups=[[parameters[0], parameters[5]], [parameters[1]]])
        compare(optimizer, parameters, lambda _: loss_of(model, batches).backward())
        names = [[slot.name for slot in packing.slots] for packing in optimizer._reducer._packings]
        return sorted(sorted(some) for some in names)

    expected = [["0.bias"], ["0.weight", "4.bias"], ["2.bias"], ["2.weight"], ["4.weight"]]
    assert cluster.run(case) == [expected] * 3


def test_num_groups_is_the_old_name(cluster):
    def case():
        from torch_job import network

        with pytest.warns(DeprecationWarning, match="replaced by groups"):
            optimizer = wrapped(network(), num_groups=3)
        return optimizer._reducer.settings.groups

    assert cluster.run(case) == [3] * 3


@pytest.mark.ranks(4, launcher=("mpi", "gloo"), env=PROCESS_SETS)
def test_process_sets_aggregate_among_themselves(cluster):
    def case():
        from torch_job import Batches, compare, loss_of, network

        import adacons_hvd.torch as hvd

        hvd.init()
        mine = [0, 2] if hvd.rank() in (0, 2) else [1, 3]
        sets = [hvd.add_process_set([0, 2]), hvd.add_process_set([1, 3])]
        model, batches = network(), Batches()
        optimizer = wrapped(model, process_set=sets[hvd.rank() % 2])
        compare(
            optimizer,
            list(model.parameters()),
            lambda _: loss_of(model, batches).backward(),
            ranks=mine,
        )
        return len(optimizer.report.weights[0])

    assert cluster.run(case, fresh=True) == [2] * 4


@pytest.mark.ranks(4, launcher="mpi", env=PROCESS_SETS)
def test_a_rank_outside_the_process_set_steps_alone(cluster):
    def case():
        import torch

        import adacons_hvd.torch as hvd

        hvd.init()
        three = hvd.add_process_set([0, 1, 2])
        weight = torch.nn.Parameter(torch.zeros(2))
        optimizer = wrapped(torch.nn.ParameterList([weight]), 1.0, process_set=three)
        (weight * float(hvd.rank() + 1)).sum().backward()
        optimizer.step()
        return optimizer.report is None, weight.tolist()

    results = cluster.run(case, fresh=True)
    assert results[3] == (True, [-4.0, -4.0])
    assert results[0] == results[1] == results[2]
    assert results[0][0] is False


def test_unit_scale_follows_the_gradients_only_if_told_of_a_loss_scale(cluster):
    """AMP: scaled gradients, one clean step, one that overflows on a single rank."""

    def case():
        import harness
        import oracle
        import torch
        from torch_job import Batches, array, assert_equal_bits, loss_of, network

        import adacons_hvd.torch as hvd

        hvd.init()
        model, batches = network(), Batches()
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1000)
        optimizer = wrapped(model, grad_scaler=scaler)
        judge = oracle.Grouped([list(range(6))])
        skipped = []
        for step in range(6):
            optimizer.zero_grad()
            loss = loss_of(model, batches)
            if step == 2 and hvd.rank() == 1:
                loss = loss * float("inf")
            before = [p.detach().clone() for p in model.parameters()]
            scale = scaler.get_scale()
            scaler.scale(loss).backward()
            mine = [array(p.grad, p) / scale for p in model.parameters()]
            optimizer.synchronize()
            scaler.unscale_(optimizer)
            if step != 2:
                expected = judge(harness.gather(mine))
                found = [array(p.grad, p) for p in model.parameters()]
                assert oracle.error(found, expected) < 1e-5
            with optimizer.skip_synchronize():
                scaler.step(optimizer)
            scaler.update()
            moved = any((b != p).any() for b, p in zip(before, model.parameters(), strict=True))
            skipped.append(not moved)
        assert_equal_bits(list(model.parameters()))
        return skipped, scaler.get_scale(), optimizer.report.fallbacks

    assert cluster.run(case) == [([False, False, True, False, False, False], 512.0, 1)] * 3


@pytest.mark.ranks(2, launcher="gloo")
class TestRefusals:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"op": "Sum"}, "op=Sum and an aggregator are two answers"),
            ({"op": "Adasum"}, "op=Adasum and an aggregator are two answers"),
            (
                {"schedule": "scenic"},
                "schedule must be one of auto, fast, two-pass, one-pass, gather, half, sketch, or a Network",
            ),
            ({"granularity": "tensor"}, 'granularity must be "model", "layer" or lists'),
            ({"backward_passes_per_step": 0}, "backward_passes_per_step must be a positive whole number, got 0"),
            ({"gradient_predivide_factor": 0.0}, "gradient_predivide_factor must be a positive number"),
            ({"groups": -1}, "groups must not be negative, got -1"),
            ({"groups": [[1]]}, "groups must hold parameters, found int"),
            ({"aggregator": "AdaCons"}, "aggregator must be an Aggregator such as AdaCons()"),
            ({"named_parameters": [("a", None)]}, "lacks 6 of the optimizer's 6 parameters"),
            ({"named_parameters": ["a"]}, "must be (name, parameter) pairs"),
            ({"backward_passes_per_step": 1.5}, "backward_passes_per_step must be a positive whole number, got 1.5"),
            ({"schedule": ["gather"]}, "schedule must be one of auto, fast,"),
            ({"schedule": "gater", "aggregator": None}, "schedule must be one of auto, fast,"),
            ({"granularity": None}, "granularity must be lists of parameters, got None"),
            ({"granularity": 4}, "granularity must be lists of parameters, got 4"),
            ({"granularity": "foreign"}, "granularity names 1 parameter that this optimizer does not train"),
            ({"may_differ": "foreign"}, "may_differ names 1 parameter that this optimizer does not train"),
            ({"groups": "foreign"}, "groups names 1 parameter that this optimizer does not train"),
            ({"grad_scaler": True}, "grad_scaler must be the torch.amp.GradScaler in use, got True"),
            ({"compression": True}, "compression must be a compressor such as Compression.fp16"),
            ({"process_set": 3}, "process_set must be a ProcessSet"),
            ({"bucket_bytes": 0}, "bucket_bytes must be a positive whole number, got 0"),
            ({"check_replicas": -1}, "check_replicas must be a whole number of steps"),
            ({"optimizer": "adam"}, "DistributedOptimizer wraps a torch.optim.Optimizer, got 'adam'"),
        ],
        ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
    )
    def test_with_a_sentence(self, cluster, arguments, message):
        def case():
            import torch
            from torch_job import network

            import adacons_hvd.torch as hvd

            hvd.init()
            op = arguments.get("op")
            given = {**arguments, "op": getattr(hvd, op)} if op else dict(arguments)
            foreign = [torch.nn.Parameter(torch.zeros(2))]
            for name in ("granularity", "groups", "may_differ"):
                if given.get(name) == "foreign":
                    given[name] = foreign if name == "may_differ" else [foreign]
            try:
                if "optimizer" in given:
                    hvd.DistributedOptimizer(given["optimizer"], aggregator=hvd.AdaCons())
                wrapped(network(), **given)
            except (ValueError, TypeError) as error:
                return str(error)
            return "no error"

        for result in cluster.run(case):
            assert message in result

    def test_the_same_name_or_parameter_twice(self, cluster):
        def case():
            from torch_job import network

            model = network()
            first, *rest = model.parameters()
            messages = []
            for arguments in (
                {"named_parameters": [("same", first), *(("same", p) for p in rest)]},
                {"groups": [[first], [first]]},
                {"granularity": [[first, first]]},
            ):
                with pytest.raises(ValueError, match=r"twice|two of") as caught:
                    wrapped(model, **arguments)
                messages.append(str(caught.value))
            return messages

        for names, groups, granularity in cluster.run(case):
            assert names == "two of the named_parameters are called 'same'"
            assert "is in groups twice" in groups
            assert "is in granularity twice" in granularity

    def test_an_aggregator_that_needs_what_the_schedule_lacks(self, cluster):
        def case():
            from torch_job import network

            from adacons_hvd import Aggregator

            class Curious(Aggregator):
                needs_gramian = True

            with pytest.raises(ValueError, match="never sees; use one of one-pass, gather"):
                wrapped(network(), aggregator=Curious(), schedule="two-pass")

        cluster.run(case)
