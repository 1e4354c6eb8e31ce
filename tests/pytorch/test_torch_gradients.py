"""Gradients as they really come."""

from __future__ import annotations

import itertools

import pytest

pytestmark = [pytest.mark.ranks(3, launcher="mpi"), pytest.mark.time_limit(120)]

SCHEDULES = ["two-pass", "one-pass", "gather"]


def wrapped(parameters, make=None, **arguments):
    import torch

    import adacons_hvd.torch as hvd
    from adacons_hvd import AdaCons

    hvd.init()
    parameters = list(parameters)
    inner = make(parameters) if make else torch.optim.SGD(parameters, lr=0.02)
    arguments.setdefault("aggregator", AdaCons())
    return hvd.DistributedOptimizer(inner, **arguments)


def noise(step, *shape):
    """The same on every rank plus something of this rank's own."""
    import harness
    import torch

    ours = torch.Generator().manual_seed(step)
    mine = torch.Generator().manual_seed(1000 * step + harness.rank() + 1)
    return torch.randn(*shape, generator=ours) + 0.5 * torch.randn(*shape, generator=mine)


def test_requires_grad_toggled_during_training(cluster):
    def case():
        from torch_job import Batches, compare, loss_of, network

        model, batches = network(), Batches()
        parameters = list(model.parameters())
        parameters[0].requires_grad_(False)  # frozen when wrapped, trained later
        history = []

        def toggle(step):
            history.append([p.detach().clone() for p in parameters])
            parameters[0].requires_grad_(step >= 1)
            parameters[4].requires_grad_(step not in (2, 3))  # frozen for a while

        optimizer = wrapped(parameters, schedule="one-pass")
        compare(optimizer, parameters, lambda _: loss_of(model, batches).backward(), steps=7, after=toggle)
        # The one trained later leaves during backward, as the others do.
        assert all(parameter in optimizer._reducer._hooks for parameter in parameters)

        def moved(index):
            pairs = itertools.pairwise(history)
            return [bool((a[index] != b[index]).any()) for a, b in pairs]

        return moved(0), moved(4)

    expected = ([False, True, True, True, True, True], [True, True, False, False, True, True])
    assert cluster.run(case) == [expected] * 3


def test_tied_weights_and_a_parameter_used_twice(cluster):
    def case():
        import torch
        from torch_job import compare

        embedding = torch.nn.Linear(6, 4, bias=False)
        output = torch.nn.Linear(4, 6, bias=False)
        torch.manual_seed(0)
        torch.nn.init.normal_(embedding.weight)
        output.weight = torch.nn.Parameter(embedding.weight.detach().T.clone())
        tied = torch.nn.Linear(4, 6, bias=False)
        tied.weight = output.weight
        model = torch.nn.Sequential(embedding, output, embedding, tied)

        def backward(step):
            (model(noise(step, 5, 6)) - 3).square().mean().backward()

        parameters = list(model.parameters())
        assert len(parameters) == 2
        compare(wrapped(parameters, schedule="one-pass"), parameters, backward)

    cluster.run(case)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_element_types_mixed_in_one_model(cluster, schedule):
    def case():
        import torch
        from torch_job import compare

        types = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
        parameters = [torch.nn.Parameter(torch.ones(40, dtype=t)) for t in types]

        def backward(step):
            for i, p in enumerate(parameters):
                (p * noise(step + 20 * i, 40).to(p.dtype)).sum().backward()

        # bfloat16 rounds to 8 bits, once on each way.
        compare(wrapped(parameters, schedule=schedule), parameters, backward, tolerance=2e-2)
        return {
            str(packing.bucket.buffer.dtype).removeprefix("torch.") for packing in wrapped_types(parameters, schedule)
        }

    def wrapped_types(parameters, schedule):
        optimizer = wrapped(parameters, schedule=schedule)
        for p in parameters:
            p.grad = None
            p.sum().backward()
        optimizer.step()
        return optimizer._reducer._packings

    expected = {"float64", "float32", "float16", "bfloat16"}
    assert cluster.run(case) == [expected] * 3


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_half_precision_models_are_as_exact_as_their_type(cluster, schedule, name):
    def case():
        import torch
        from torch_job import compare

        dtype = getattr(torch, name)
        parameters = [torch.nn.Parameter(torch.ones(300, dtype=dtype)) for _ in range(2)]

        def backward(step):
            for i, p in enumerate(parameters):
                (p * noise(step + 20 * i, 300).to(dtype)).sum().backward()

        # One rounding of each gradient's share, one of the result.
        tolerance = 3 * torch.finfo(dtype).eps
        compare(wrapped(parameters, schedule=schedule), parameters, backward, tolerance=tolerance)

    cluster.run(case)


def test_channels_last_and_other_strides(cluster):
    def case():
        import harness
        import torch
        from torch_job import compare

        torch.manual_seed(0)
        convolution = torch.nn.Conv2d(3, 8, 3)
        if harness.rank() == 1:  # the layout in memory is each rank's own affair
            convolution = convolution.to(memory_format=torch.channels_last)
        transposed = torch.nn.Parameter(torch.randn(4, 5).t())
        parameters = [*convolution.parameters(), transposed]

        def backward(step):
            x = noise(step, 2, 3, 6, 6)
            if harness.rank() == 1:
                x = x.to(memory_format=torch.channels_last)
            ((convolution(x) - 2).square().mean() + (transposed * noise(step, 5, 4)).sum()).backward()

        compare(wrapped(parameters, schedule="one-pass"), parameters, backward)
        assert not transposed.is_contiguous()
        return parameters[0].grad.stride()

    strides = cluster.run(case)
    assert strides[0] != strides[1]


def test_a_gradient_alone_in_its_bucket_is_used_where_it_is(cluster):
    """Unless its elements lie otherwise than a bucket's, or are not as many as shards of equal length need."""

    def case():
        import torch
        from torch_job import compare

        import adacons_hvd.torch as hvd

        def used_in_place(shape, memory_format=torch.contiguous_format, tolerance=1e-5, **options):
            p = torch.nn.Parameter(torch.ones(shape).to(memory_format=memory_format))

            def backward(step):
                # Twice, so that what has left already changes.
                for turn in range(2):
                    p.backward(noise(2 * step + turn, *shape).to(memory_format=memory_format))

            optimizer = wrapped([p], backward_passes_per_step=1, **options)
            compare(optimizer, [p], backward, tolerance=tolerance)
            (packing,) = optimizer._reducer._packings
            copied = "_buffer" in vars(packing)
            # Between steps nobody but the parameter holds the gradient.
            assert copied or packing.bucket.buffer.numel() == 0
            return not copied

        return [
            *(used_in_place((6, 4), schedule=schedule) for schedule in ("one-pass", "two-pass", "gather")),
            used_in_place((7,)),
            used_in_place((3, 2, 4, 4), torch.channels_last),
            used_in_place((6, 4), compression=hvd.Compression.fp16, tolerance=1e-2),
        ]

    assert cluster.run(case) == [[True, True, True, False, False, False]] * 3


def test_sparse_as_dense(cluster):
    def case():
        import harness
        import torch
        from torch_job import compare

        torch.manual_seed(0)
        table = torch.nn.Embedding(20, 3, sparse=True)

        def backward(step):
            generator = torch.Generator().manual_seed(10 * step + harness.rank())
            (table(torch.randint(0, 20, (9,), generator=generator)) - 3).square().mean().backward()

        optimizer = wrapped([table.weight], sparse_as_dense=True, make=lambda p: torch.optim.SparseAdam(p))
        compare(optimizer, [table.weight], backward)
        return type(optimizer._reducer._packings[0]).__name__, table.weight.grad.is_sparse

    assert cluster.run(case) == [("DensePacking", True)] * 3


def test_three_thousand_tensors_and_one(cluster):
    def case(count, granularity):
        import torch
        from torch_job import compare

        parameters = [torch.nn.Parameter(torch.ones(2)) for _ in range(count)]

        def backward(step):
            whole = noise(step, count, 2)
            torch.autograd.backward([p.sum() for p in parameters], [w.mean() for w in whole.unbind()])

        groups = [[i] for i in range(count)] if granularity == "layer" else None
        compare(
            wrapped(parameters, granularity=granularity, aggregator=smooth(), schedule="one-pass"),
            parameters,
            backward,
            steps=2,
            groups=groups,
            settings={"momentum": 0.0, "scale": "average", "normalize": False},
        )

    def smooth():
        from adacons_hvd import AdaCons

        # Single numbers oppose each other often; without Eq. 13 nothing is divided by their sum.
        return AdaCons(momentum=0, scale="average", normalize=False)

    cluster.run(case, 3_000, "model")
    cluster.run(case, 500, "layer")
    cluster.run(case, 1, "model")


def test_compiled_modules(cluster):
    def case():
        import torch
        from torch_job import Batches, compare, loss_of, network

        model, batches = network(), Batches()
        # The same tracing and the same split into forward and backward graphs as the default
        # backend, without its C++ compiler.
        compiled = torch.compile(model, backend="aot_eager")
        optimizer = wrapped(model.parameters(), schedule="one-pass")
        compare(optimizer, list(model.parameters()), lambda _: loss_of(compiled, batches).backward())

    cluster.run(case)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_backward(cluster, reentrant):
    def case():
        from torch.utils.checkpoint import checkpoint
        from torch_job import Batches, compare, network

        model, batches = network(), Batches()
        block, head = model[:3], model[3:]

        def backward(_):
            x = batches(8, 6).requires_grad_()
            # The block is used twice: reentrant checkpoints run a backward of their own for each
            # use, so its parameters are added to twice in one step.
            y = sum(checkpoint(block, x * scale, use_reentrant=reentrant) for scale in (1.0, 0.5))
            (head(y) - 4).square().mean().backward()

        optimizer = wrapped(model.parameters(), schedule="one-pass", bucket_bytes=64)
        compare(optimizer, list(model.parameters()), backward)
        return max(slot.expected for slot in optimizer._reducer._slots.values())

    assert cluster.run(case) == [2 if reentrant else 1] * 3


@pytest.mark.ranks(1, launcher=("mpi", "gloo"))
@pytest.mark.parametrize("schedule", ["auto", *SCHEDULES])
def test_one_process(cluster, schedule):
    def case():
        from torch_job import Batches, compare, loss_of, network

        model, batches = network(), Batches()
        optimizer = wrapped(model.parameters(), schedule=schedule)
        compare(optimizer, list(model.parameters()), lambda _: loss_of(model, batches).backward())

    cluster.run(case)


def test_two_optimizers_as_a_gan_has_them(cluster):
    """Backward through the discriminator for the generator's sake fires both optimizers' hooks."""

    def case():
        import harness
        import oracle
        import torch
        from torch_job import array, assert_equal_bits, network

        from adacons_hvd import AdaCons

        shared = AdaCons()  # one instance may serve several optimizers
        generator, discriminator = network(1), torch.nn.Linear(network(1)[-1].out_features, 1)
        torch.manual_seed(3)
        for p in discriminator.parameters():
            torch.nn.init.normal_(p)
        optimizers = [
            wrapped(m.parameters(), aggregator=shared, schedule="one-pass", bucket_bytes=64)
            for m in (generator, discriminator)
        ]
        judges = [oracle.Grouped([list(range(6))]), oracle.Grouped([[0, 1]])]

        def step(which, model, loss):
            model.zero_grad()  # not the optimizer's: its gradients may be half-way out
            loss.backward()
            parameters = list(model.parameters())
            everyone = harness.gather([array(p.grad, p) for p in parameters])
            optimizers[which].synchronize()
            found = [array(p.grad, p) for p in parameters]
            assert oracle.error(found, judges[which](everyone)) < 1e-5
            with optimizers[which].skip_synchronize():
                optimizers[which].step()

        for turn in range(5):
            real = noise(turn, 8, discriminator.in_features) + 2
            fake = generator(noise(turn + 30, 8, 6))
            step(1, discriminator, (discriminator(fake.detach()) + 1 - discriminator(real)).mean())
            step(0, generator, -discriminator(fake).mean() + fake.square().mean())
        assert_equal_bits([*generator.parameters(), *discriminator.parameters()])

    cluster.run(case)


def test_accumulation_by_hand(cluster):
    """Several backward passes and one step, without having said how many."""

    def case():
        from torch_job import Batches, compare, loss_of, network

        model, batches = network(), Batches()

        def backward(step):
            for _ in range(1 + step % 3):
                loss_of(model, batches).backward()

        optimizer = wrapped(model.parameters(), schedule="one-pass", bucket_bytes=64)
        compare(optimizer, list(model.parameters()), backward, steps=9)

    cluster.run(case)


def test_parameters_added_after_wrapping(cluster):
    def case():
        import torch
        from torch_job import compare

        first, second = torch.nn.Parameter(torch.ones(4)), torch.nn.Parameter(torch.ones(3))
        optimizer = wrapped([first])

        def backward(step):
            ((first * noise(step, 4)).sum() + (second * noise(step + 9, 3)).sum()).backward()

        backward(0)
        optimizer.step()
        second.grad = None
        optimizer.add_param_group({"params": [second], "lr": 0.5})
        optimizer._reducer.state.memory = {}  # so that the oracle starts where the optimizer does
        compare(optimizer, [first, second], backward)

    cluster.run(case)


@pytest.mark.parametrize("schedule", ["two-pass", "one-pass"])
def test_the_first_collective_leaves_while_backward_runs(cluster, schedule):
    def case():
        import time

        import torch
        from torch_job import Batches, compare, network

        model, batches = network(), Batches()
        last = list(model.parameters())[-1]
        optimizer = wrapped(model.parameters(), schedule=schedule, bucket_bytes=1)
        seen = []

        class Watch(torch.autograd.Function):
            """The identity; its backward takes a while, and looks whether the last layer's gradient has left."""

            @staticmethod
            def forward(ctx, x):
                return x.clone()

            @staticmethod
            def backward(ctx, gradient):
                slot = optimizer._reducer._slots.get(last)
                seen.append(slot is not None and slot.packing.bucket.begun)
                time.sleep(0.3)
                return gradient

        def backward(_):
            # One in the middle, one before the first layer, whose backward comes last of all.
            x = Watch.apply(batches(8, 6).requires_grad_())
            y = model[2:](Watch.apply(model[:2](x)))
            (y - 4).square().mean().backward()

        compare(optimizer, list(model.parameters()), backward, steps=3)
        return seen[1::2]

    # The first step lays out the buckets; from then on they leave early.
    assert cluster.run(case) == [[False, True, True]] * 3


def test_without_overlap_nothing_leaves_early(cluster):
    def case():
        from torch_job import Batches, compare, loss_of, network

        model, batches = network(), Batches()
        optimizer = wrapped(model.parameters(), schedule="one-pass", overlap=False)
        begun = []

        def backward(_):
            loss_of(model, batches).backward()
            begun.extend(packing.bucket.begun for packing in optimizer._reducer._packings)

        compare(optimizer, list(model.parameters()), backward)
        return any(begun), len(begun)

    assert cluster.run(case) == [(False, 5)] * 3


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_step_inside_of_an_autocast_keeps_its_precision(cluster, schedule):
    def case():
        import torch
        from torch_job import Batches, compare, loss_of, network

        model, batches = network(), Batches()
        optimizer = wrapped(model.parameters(), schedule=schedule)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            compare(optimizer, list(model.parameters()), lambda _: loss_of(model, batches).backward())

    cluster.run(case)


@pytest.mark.parametrize("how", ["in place", "replaced", "removed"])
def test_gradients_changed_by_hand_after_they_left(cluster, how):
    """A step aggregates the gradients that are there when step() is called, on all ranks or on one."""

    def case():
        import time

        import harness
        import torch
        from torch_job import Batches, compare, loss_of, network

        model, batches = network(), Batches()
        parameters = list(model.parameters())

        def backward(step):
            loss_of(model, batches).backward()
            time.sleep(0.02)
            if step % 2 and harness.rank() != 1:
                return
            for p in parameters[2:]:
                if how == "in place":
                    p.grad.clamp_(-0.1, 0.1)
                else:
                    p.grad = torch.ones_like(p) if how == "replaced" else None

        # Sums leave at once, so the gradients are on their way when they are changed.
        optimizer = wrapped(parameters, schedule="two-pass", bucket_bytes=64)
        compare(optimizer, parameters, backward)

    cluster.run(case)
