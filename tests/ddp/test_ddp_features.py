"""Everything DDP can do goes on working, with the aggregated gradient in place of the average."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any, cast

import pytest

# Each test imports these on the ranks; named here for type checkers and readers alike.
import torch

pytestmark = [pytest.mark.ranks(3, launcher="torchrun"), pytest.mark.time_limit(120)]


# --- what DDP offers ----------------------------------------------------------------------------


def accumulation() -> None:
    from ddp_job import network, train

    optimizer = train(network(), passes=3)
    assert optimizer.report.steps == 4  # not 12: only the last pass of a step aggregates


def test_no_sync_accumulates_before_aggregating(cluster):
    cluster.run(accumulation)


def ddp_options() -> None:
    from ddp_job import network, train

    for options in (
        {"gradient_as_bucket_view": True},
        {"static_graph": True},
        {"static_graph": True, "gradient_as_bucket_view": True},
        {"bucket_cap_mb": 25},
        {"find_unused_parameters": True},
    ):
        for schedule in ("two-pass", "one-pass", "gather"):
            train(network(), options=options, schedule=schedule, steps=3)
            # Several buckets from the first step on.
            kinds = Kinds([torch.float32, torch.float64])
            train(kinds, kinds_loss, options=options, schedule=schedule, steps=3, make_optimizer=slow_sgd)


def test_the_options_of_ddp(cluster):
    cluster.run(ddp_options)


class Branches(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.branches = torch.nn.ModuleList([torch.nn.Linear(6, 3) for _ in range(3)])
        self.shared = torch.nn.Linear(3, 2)
        self.never = torch.nn.Parameter(torch.ones(5))


def branch_loss(model: torch.nn.Module, step: int) -> torch.Tensor:
    """Uses one branch, not the same on all ranks; in step 1 nobody uses branch 2."""
    import harness
    from ddp_job import batch

    chosen = (harness.rank() + step) % (2 if step == 1 else 3)
    return model(batch(step), chosen).square().sum()


class Chooser(Branches):
    def forward(self, x: torch.Tensor, chosen: int) -> torch.Tensor:
        return self.shared(self.branches[chosen](x)) + 3


def unused() -> None:
    from ddp_job import train

    for schedule in ("two-pass", "one-pass", "gather"):
        module = Chooser()
        train(module, branch_loss, options={"find_unused_parameters": True}, schedule=schedule)
        assert module.never.grad is None


def test_parameters_without_a_gradient_here_or_anywhere(cluster):
    cluster.run(unused)


def frozen() -> None:
    from ddp_job import network, train

    module = network()
    module[0].weight.requires_grad_(False)
    before = module[0].weight.clone()
    optimizer = train(module, granularity="layer", groups=lambda names: [[i] for i in range(len(names))])
    assert len(optimizer.report.weights) == 5
    assert torch.equal(module[0].weight, before)

    # Frozen in the middle of training: it counts as a gradient of zeros.
    from ddp_job import assert_equal_bits, loss_of, wrap

    import adacons_hvd.ddp
    from adacons_hvd import AdaCons

    module = network()
    model = wrap(module, find_unused_parameters=True)
    optimizer = cast(Any, torch.optim.SGD(model.parameters(), lr=0.02))
    adacons_hvd.ddp.attach(model, optimizer, AdaCons(), schedule="one-pass")
    for step in range(4):
        optimizer.zero_grad()
        if step == 2:
            module[2].weight.requires_grad_(False)
            before = module[2].weight.clone()
        loss_of(model, step).backward()
        optimizer.step()
    assert_equal_bits(model.parameters())
    assert torch.equal(module[2].weight, before)
    assert optimizer.report.steps == 4

    # Between wrapping and attaching, DDP and this package would have different ideas of the model.
    module = network()
    model = wrap(module)
    module[2].weight.requires_grad_(False)
    with pytest.raises(ValueError, match="DistributedDataParallel looks after 6 parameters, but 5 require a gradient"):
        adacons_hvd.ddp.attach(model, torch.optim.SGD(model.parameters(), lr=0.02), AdaCons())


def test_frozen_parameters(cluster):
    cluster.run(frozen)


def ignored() -> None:
    from ddp_job import network, wrap
    from torch.nn.parallel import DistributedDataParallel

    import adacons_hvd.ddp
    from adacons_hvd import AdaCons

    module = network()
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, ["0.bias"])
    model = wrap(module)
    optimizer: Any = torch.optim.SGD(model.parameters(), lr=0.02)
    adacons_hvd.ddp.attach(model, optimizer, AdaCons(), granularity="layer")
    model(torch.ones(2, 6)).sum().backward()
    assert len(optimizer.report.weights) == 5


def test_parameters_that_ddp_ignores(cluster):
    cluster.run(ignored)


def joined(schedule: str, nonfinite: str) -> None:
    import harness
    from ddp_job import assert_equal_bits, loss_of, network, wrap

    import adacons_hvd.ddp
    from adacons_hvd import AdaCons

    for static in (False, True):
        model = wrap(network(), static_graph=static)
        optimizer: Any = torch.optim.SGD(model.parameters(), lr=0.02)
        adacons_hvd.ddp.attach(model, optimizer, AdaCons(nonfinite=nonfinite), schedule=schedule)
        with model.join():
            for step in range(2 + harness.rank()):
                optimizer.zero_grad()
                loss_of(model, step).backward()
                # Alone, or not, the aggregate is made of those present.
                reported = optimizer.report.present[0]
                assert reported == [2 + rank > step for rank in range(harness.size())]
                weights = optimizer.report.weights[0]
                assert all((w != 0) == here for w, here in zip(weights, reported, strict=True))
                optimizer.step()
        assert optimizer.report.steps == 1 + harness.size()
        assert_equal_bits(model.parameters())


@pytest.mark.parametrize("schedule", ["two-pass", "one-pass", "gather"])
@pytest.mark.parametrize("nonfinite", ["propagate", "exclude"])
def test_ranks_that_run_out_of_data(cluster, schedule, nonfinite):
    cluster.run(joined, schedule, nonfinite)


def subgroup() -> None:
    import harness
    import torch.distributed as dist
    from ddp_job import loss_of, network, start, train

    start()
    pair = dist.new_group([0, 2])
    alone = dist.new_group([1])
    mine = [1] if harness.rank() == 1 else [0, 2]
    for schedule in ("two-pass", "one-pass", "gather"):
        optimizer = train(
            network(),
            loss_of,
            options={"process_group": alone if harness.rank() == 1 else pair},
            schedule=schedule,
            ranks=mine,
        )
        assert len(optimizer.report.weights[0]) == len(mine)


def test_the_models_own_process_group_and_a_group_of_one(cluster):
    cluster.run(subgroup)


def adversaries() -> None:
    """Two models, two optimizers, both in one backward pass at times."""
    from ddp_job import assert_equal_bits, batch, wrap

    import adacons_hvd.ddp
    from adacons_hvd import AdaCons

    torch.manual_seed(0)
    generator, judge = wrap(torch.nn.Linear(6, 5)), wrap(torch.nn.Linear(5, 1))
    optimizers: list[Any] = [torch.optim.Adam(m.parameters(), lr=0.01) for m in (generator, judge)]
    for model, optimizer, beta in zip((generator, judge), optimizers, (0.9, 0.5), strict=True):
        adacons_hvd.ddp.attach(model, optimizer, AdaCons(momentum=beta), schedule="one-pass")
    for step in range(4):
        x = batch(step)
        for optimizer in optimizers:
            optimizer.zero_grad()
        (judge(generator(x)) - 1).square().mean().backward()
        optimizers[0].step()
        optimizers[1].zero_grad()
        judge(generator(x).detach()).square().mean().backward()
        optimizers[1].step()
    assert_equal_bits([*generator.parameters(), *judge.parameters()])
    assert [o.report.steps for o in optimizers] == [4, 8]
    assert [o.aggregator.momentum for o in optimizers] == [0.9, 0.5]


def test_several_models(cluster):
    cluster.run(adversaries)


# --- gradients as they come ---------------------------------------------------------------------


class Kinds(torch.nn.Module):
    """Parameters of several types and shapes, each with a gradient that depends on the batch."""

    def __init__(self, dtypes: list[torch.dtype]) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        shapes = [(), (0,), (3, 5), (2, 3, 4)]
        self.ps = torch.nn.ParameterList(
            [torch.nn.Parameter(torch.randn(s, generator=generator).to(d)) for d in dtypes for s in shapes]
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        total = x.new_zeros(())
        for i, p in enumerate(self.ps):
            real = torch.view_as_real(p) if p.is_complex() else p
            total = total + ((real.to(x.dtype) * x[0, i % 6] + x[1, 0] + 2) ** 2).sum()
        return total


def slow_sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=1e-3)


def kinds_loss(model: torch.nn.Module, step: int) -> torch.Tensor:
    from ddp_job import batch

    return model(batch(step, dtype=torch.float64))


def element_types(names: list[str], tolerance: float) -> None:
    from ddp_job import train

    for schedule in ("two-pass", "one-pass", "gather"):
        train(
            Kinds([getattr(torch, name) for name in names]),
            kinds_loss,
            schedule=schedule,
            tolerance=tolerance,
            make_optimizer=slow_sgd,
        )


@pytest.mark.parametrize(
    ("names", "tolerance"),
    [
        (["float64", "complex128"], 1e-12),
        (["float32", "float64", "complex64"], 1e-6),
        (["float16"], 2e-3),
        (["float32", "bfloat16", "float16"], 1e-2),
    ],
)
def test_element_types_and_odd_shapes(cluster, names, tolerance):
    cluster.run(element_types, names, tolerance)


def complex_buckets() -> list[bool]:
    """Hand over buckets of complex numbers and take the same back; whether each bucket was one."""
    from ddp_job import train

    from adacons_hvd.ddp import attaching

    found = []
    hook = attaching.adacons_hook

    class Bucket:
        def __init__(self, real: Any) -> None:
            self.real, self.parameters = real, real.parameters

        def buffer(self) -> torch.Tensor:
            return torch.view_as_complex(self.real.buffer().view(-1, 2))

    def complex_hook(reducer, bucket):  # PyTorch refuses types that are not its own
        found.append(bucket.parameters()[0].is_complex())
        if not found[-1]:
            return hook(reducer, bucket)
        return hook(reducer, cast(Any, Bucket(bucket))).then(lambda future: torch.view_as_real(future.value()).view(-1))

    attaching.adacons_hook = complex_hook
    try:
        train(Kinds([torch.float64, torch.complex128]), kinds_loss, tolerance=1e-12, make_optimizer=slow_sgd)
    finally:
        attaching.adacons_hook = hook
    return found


def test_complex_buckets_of_older_versions_of_pytorch(cluster):
    """Newer ones hand them over as real numbers."""
    for found in cluster.run(complex_buckets):
        assert {True, False} <= set(found)


class Words(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words = torch.nn.Embedding(50, 3, sparse=True)
        self.bags = torch.nn.EmbeddingBag(40, 4, mode="sum", sparse=True)
        self.head = torch.nn.Linear(7, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.cat([self.words(x).sum(1), self.bags(x % 40)], 1))


def words_loss(model: torch.nn.Module, step: int) -> torch.Tensor:
    """Some words on all ranks, some twice, and a number of them that differs between ranks."""
    import harness

    generator = torch.Generator().manual_seed(10 * step + harness.rank())
    x = torch.randint(0, 50, (4 + 3 * harness.rank(), 5), generator=generator)
    return (model(x) - 2).square().mean()


def sparse(schedule: str) -> None:
    from ddp_job import train

    for granularity in ("model", "layer"):
        module: Any = Words()
        train(
            module,
            words_loss,
            schedule=schedule,
            granularity=granularity,
            groups=None if granularity == "model" else lambda names: [[i] for i in range(len(names))],
        )
        assert module.words.weight.grad.is_sparse
        assert module.bags.weight.grad.is_sparse


@pytest.mark.parametrize("schedule", ["two-pass", "one-pass", "gather", "auto"])
def test_sparse_embeddings(cluster, schedule):
    cluster.run(sparse, schedule)


def only_sparse() -> None:
    from ddp_job import train

    class Table(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.words = torch.nn.Embedding(50, 3, sparse=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.words(x)

    train(Table(), words_loss)


def test_nothing_but_a_sparse_embedding(cluster):
    cluster.run(only_sparse)


def checkpointed() -> None:
    from ddp_job import batch, network, train
    from torch.utils.checkpoint import checkpoint

    def loss(model: torch.nn.Module, step: int) -> torch.Tensor:
        return (model(batch(step)) - 4).square().mean()

    class Checkpointed(torch.nn.Module):
        def __init__(self, reentrant: bool) -> None:
            super().__init__()
            self.first, self.rest = network()[0], network()[1:]
            self.reentrant = reentrant

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return checkpoint(self.rest, self.first(x), use_reentrant=self.reentrant)

    train(Checkpointed(False), loss)
    train(Checkpointed(True), loss, options={"static_graph": True})


def test_checkpointing(cluster):
    cluster.run(checkpointed)


# --- gradients that are not numbers -------------------------------------------------------------


def scaled(schedule: str) -> None:
    """With a loss scale in force, the result is as without, times the scale."""
    import harness
    from ddp_job import assert_equal_bits, loss_of, network, wrap

    import adacons_hvd.ddp
    from adacons_hvd import AdaCons

    plain, amp = network(dtype=torch.float64), network(dtype=torch.float64)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=2)
    models, optimizers = [wrap(plain), wrap(amp)], []
    for model, used in zip(models, (None, scaler), strict=True):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
        adacons_hvd.ddp.attach(model, optimizer, AdaCons(), schedule=schedule, grad_scaler=used)
        optimizers.append(optimizer)
    for step in range(5):
        for optimizer in optimizers:
            optimizer.zero_grad()
        overflows = step == 2
        if not overflows:
            loss_of(models[0], step).backward()
            optimizers[0].step()
        loss = loss_of(models[1], step)
        if overflows and harness.rank() == 0:
            loss = loss + amp[0].bias.sum() * float("inf")
        scale = scaler.get_scale()
        scaler.scale(loss).backward()
        scaler.step(optimizers[1])
        scaler.update()
        if overflows:
            assert scaler.get_scale() == scale / 2  # on every rank
        for p, q in zip(plain.parameters(), amp.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)
    assert_equal_bits(amp.parameters())


@pytest.mark.parametrize("schedule", ["two-pass", "one-pass", "gather"])
def test_a_loss_scale(cluster, schedule):
    cluster.run(scaled, schedule)


def autocast() -> None:
    """Casts in the model, and none in the aggregation, even with backward inside."""
    from ddp_job import batch, network, train

    def loss(model: torch.nn.Module, step: int) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = model(batch(step))
            assert y.dtype == torch.bfloat16
        return (y.float() - 4).square().mean()

    class Inside:
        """A loss whose backward runs under autocast."""

        def __init__(self, value: torch.Tensor) -> None:
            self.value = value

        def backward(self) -> None:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                self.value.backward()

    for schedule in ("two-pass", "one-pass", "gather"):
        train(network(), loss, schedule=schedule)
        train(network(), lambda model, step: cast(Any, Inside(loss(model, step))), schedule=schedule)


def test_autocast(cluster):
    cluster.run(autocast)


def compiled() -> None:
    from ddp_job import assert_equal_bits, loss_of, network, wrap

    import adacons_hvd.ddp
    from adacons_hvd import AdaCons

    found = []
    for compiler, early in ((None, True), ("aot_eager", True), ("aot_eager", False)):
        # The compiler wants a first bucket no larger than the others, so no small ones here.
        model = wrap(network(dtype=torch.float64), bucket_cap_mb=25)
        optimizer: Any = torch.optim.SGD(model.parameters(), lr=0.02)
        called: Any = model if compiler is None else torch.compile(model, backend=compiler)
        adacons_hvd.ddp.attach(model if early else called, optimizer, AdaCons(), schedule="one-pass")
        for step in range(3):
            optimizer.zero_grad()
            loss_of(called, step).backward()
            optimizer.step()
        assert optimizer.report.steps == 3
        assert_equal_bits(model.parameters())
        found.append([p.detach() for p in model.parameters()])
    for p, *others in zip(*found, strict=True):
        for q in others:
            torch.testing.assert_close(p, q, rtol=1e-11, atol=1e-11)


def test_a_compiled_model(cluster):
    cluster.run(compiled)


# --- the optimizer ------------------------------------------------------------------------------


def optimizers() -> None:
    from ddp_job import assert_equal_bits, loss_of, network, train, wrap

    import adacons_hvd.ddp
    from adacons_hvd import AdaCons, Mean

    for make in (
        lambda ps: torch.optim.SGD(ps, lr=0.02, momentum=0.9, nesterov=True),
        lambda ps: torch.optim.AdamW(ps, lr=0.01),
        lambda ps: torch.optim.Adam(ps, lr=0.01, fused=True),
    ):
        optimizer = train(network(), make_optimizer=make, steps=2)
        assert type(optimizer) in (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW)

    # Evaluates its closure several times a step.
    model = wrap(network())
    lbfgs: Any = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3)
    adacons_hvd.ddp.attach(model, lbfgs, AdaCons(scale="average"))

    def closure() -> torch.Tensor:
        lbfgs.zero_grad()
        # All ranks must see the same loss, or they would evaluate it unequally often.
        loss = model(torch.ones(2, 6)).square().mean()
        loss.backward()
        return loss

    for _ in range(2):
        lbfgs.step(closure)
    assert lbfgs.report.steps >= 4
    assert_equal_bits(model.parameters())

    # A scheduler made before, clipping after.
    model = wrap(network())
    sgd: Any = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(sgd, 1, gamma=0.5)
    adacons_hvd.ddp.attach(model, sgd, Mean())
    for step in range(2):
        sgd.zero_grad()
        loss_of(model, step).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01)
        before = [p.detach().clone() for p in model.parameters()]
        sgd.step()
        scheduler.step()
    moved = sum(float((p - q).square().sum()) for p, q in zip(model.parameters(), before, strict=True)) ** 0.5
    assert moved == pytest.approx(0.05 * 0.01, rel=1e-3)


def test_optimizers(cluster):
    cluster.run(optimizers)


def average() -> None:
    """``Mean()`` is DDP's own average."""
    from ddp_job import loss_of, network, wrap

    import adacons_hvd.ddp
    from adacons_hvd import Mean

    ours, theirs = wrap(network(dtype=torch.float64)), wrap(network(dtype=torch.float64))
    adacons_hvd.ddp.attach(ours, torch.optim.SGD(ours.parameters(), lr=0.1), Mean())
    for step in range(3):
        ours.zero_grad()
        theirs.zero_grad()
        loss_of(ours, step).backward()
        loss_of(theirs, step).backward()
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-12, atol=1e-14)


def test_mean_is_what_ddp_does(cluster):
    cluster.run(average)


def gramian_aggregator() -> None:
    from ddp_job import loss_of, network, wrap

    import adacons_hvd.ddp
    from adacons_hvd import Aggregator

    class ByGramian(Aggregator):
        needs_gramian = True

        def weights(self, statistics: Any) -> Any:
            assert statistics.gramian.shape[-2:] == (3, 3)
            return statistics.gramian.sum(-1) / statistics.gramian.sum((-1, -2))[..., None]

    for schedule in ("one-pass", "gather", "auto"):
        model = wrap(network())
        optimizer: Any = torch.optim.SGD(model.parameters(), lr=0.1)
        adacons_hvd.ddp.attach(model, optimizer, ByGramian(), schedule=schedule)
        loss_of(model, 0).backward()
        assert sum(optimizer.report.weights[0]) == pytest.approx(1)
        assert optimizer.report.schedule != "two-pass"
    model = wrap(network())
    with pytest.raises(ValueError, match="Gramian"):
        adacons_hvd.ddp.attach(model, torch.optim.SGD(model.parameters()), ByGramian(), schedule="two-pass")


def test_an_aggregator_of_the_users_own(cluster):
    cluster.run(gramian_aggregator)


def zero_redundancy() -> None:
    from ddp_job import network, train
    from torch.distributed.optim import ZeroRedundancyOptimizer

    train(network(), make_optimizer=lambda ps: ZeroRedundancyOptimizer(ps, torch.optim.SGD, lr=0.02))


def test_zero_redundancy_optimizer(cluster):
    cluster.run(zero_redundancy)


# --- how it is done -----------------------------------------------------------------------------


def overlap() -> None:
    """Buckets have begun when backward reaches the first layer, where the schedule allows it."""
    from ddp_job import batch, network, wrap

    import adacons_hvd.ddp
    from adacons_hvd import AdaCons
    from adacons_hvd.schedules import DenseBucket

    begun: list[str] = []
    begin = DenseBucket.begin

    def noted(self: DenseBucket) -> None:
        begun.append(self.name)
        begin(self)

    DenseBucket.begin = noted  # type: ignore[method-assign]
    try:
        for nonfinite, schedule, early in (
            ("propagate", "two-pass", True),
            ("raise", "one-pass", True),
            ("propagate", "gather", False),
            ("exclude", "one-pass", False),
        ):
            model = wrap(network())
            optimizer: Any = torch.optim.SGD(model.parameters(), lr=0.02)
            adacons_hvd.ddp.attach(model, optimizer, AdaCons(nonfinite=nonfinite), schedule=schedule)
            at_first_layer: list[int] = []
            model.module[1].register_full_backward_hook(lambda *_, seen=at_first_layer: seen.append(len(begun)))
            for step in range(3):
                begun.clear()
                model(batch(step)).sum().backward()
            # DDP knows how to fill several buckets from its second step on.
            assert len(set(begun)) > 1
            assert (at_first_layer[-1] > 0) == early
    finally:
        DenseBucket.begin = begin  # type: ignore[method-assign]


def test_buckets_leave_while_backward_still_runs(cluster):
    cluster.run(overlap)


def in_place() -> None:
    """Where lengths allow, the gradient is aggregated in DDP's own buffer, and never copied."""
    from ddp_job import batch, wrap

    import adacons_hvd.ddp
    from adacons_hvd import AdaCons

    for width, padded in ((6, False), (7, True)):
        for schedule in ("two-pass", "one-pass", "gather"):
            model = wrap(torch.nn.Linear(6, width, bias=False), gradient_as_bucket_view=True)
            adacons_hvd.ddp.attach(
                model, torch.optim.SGD(model.parameters(), lr=0.1), AdaCons(scale="average"), schedule=schedule
            )
            for step in range(3):
                model(batch(step)).sum().backward()
            ((_, reducer),) = model._comm_hooks
            (part,) = reducer._parts
            same = part.bucket.buffer.data_ptr() == model.module.weight.grad.data_ptr()
            assert same == (not padded or (6 * width) % 3 == 0)


def test_no_copy_where_none_is_needed(cluster):
    cluster.run(in_place)


def lifetime() -> None:
    from ddp_job import loss_of, network, wrap

    import adacons_hvd.ddp
    from adacons_hvd import AdaCons

    model: Any = wrap(network())
    optimizer: Any = torch.optim.SGD(model.parameters(), lr=0.02)
    adacons_hvd.ddp.attach(model, optimizer, AdaCons())
    loss_of(model, 0).backward()

    twin = copy.deepcopy(model)  # as torch.optim.swa_utils.AveragedModel does
    fresh: Any = torch.optim.SGD(twin.parameters(), lr=0.02)
    adacons_hvd.ddp.attach(twin, fresh, AdaCons())
    loss_of(twin, 0).backward()
    assert fresh.report.steps == optimizer.report.steps == 1

    watched = [weakref.ref(optimizer), weakref.ref(model), weakref.ref(next(model.parameters()))]
    del optimizer
    gc.collect()
    assert watched[0]() is None  # with the moments an optimizer holds, though the model lives on
    del model
    gc.collect()
    assert [ref() for ref in watched] == [None, None, None]


def test_copies_and_lifetime(cluster):
    cluster.run(lifetime)


def reported() -> Any:
    from ddp_job import loss_of, network, wrap

    import adacons_hvd.ddp
    from adacons_hvd import AdaCons

    model = wrap(network())
    optimizer: Any = torch.optim.SGD(model.parameters(), lr=0.02)
    aggregator = AdaCons()
    adacons_hvd.ddp.attach(model, optimizer, aggregator)
    assert vars(optimizer)["report"] is None
    assert optimizer.aggregator is aggregator
    loss_of(model, 0).backward()
    return optimizer.report.as_dict()


def test_the_report_is_the_same_on_every_rank(cluster):
    first, *others = cluster.run(reported)
    assert all(other == first for other in others)
    assert first["steps"] == 1
    assert first["schedule"] in ("two-pass", "one-pass", "gather")
    assert first["reason"].startswith("auto: for ")
    assert "3 workers on 1 host" in first["reason"]
    assert list(first["coefficients"]) == ["first-order", "momentum", "normalized"]
    assert sum(first["coefficients"]["normalized"][0]) == pytest.approx(1)


# --- what is refused ----------------------------------------------------------------------------


def disagreement() -> str:
    import harness
    from ddp_job import network, wrap

    import adacons_hvd.ddp
    from adacons_hvd import AdaCons
    from adacons_hvd.agreement import DisagreementError

    model = wrap(network())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    with pytest.raises(DisagreementError) as raised:
        adacons_hvd.ddp.attach(model, optimizer, None if harness.rank() == 1 else AdaCons())
    return str(raised.value)


def test_ranks_that_disagree_about_having_an_aggregator_are_all_told(cluster):
    for message in cluster.run(disagreement):
        assert "None (DDP's own average) on rank 1" in message


def refusals() -> None:
    from ddp_job import network, wrap

    import adacons_hvd.ddp
    from adacons_hvd import AdaCons

    attach = adacons_hvd.ddp.attach
    module = network()
    sgd = torch.optim.SGD(module.parameters(), lr=0.1)
    with pytest.raises(TypeError, match="model must be a DistributedDataParallel, got Sequential"):
        attach(module, sgd, AdaCons())  # type: ignore[arg-type]
    model = wrap(module)
    with pytest.raises(TypeError, match="aggregator must be an Aggregator"):
        attach(model, sgd, 0.99)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="schedule must be one of auto, fast, two-pass"):
        attach(model, sgd, AdaCons(), schedule="ring")
    with pytest.raises(ValueError, match="granularity must be"):
        attach(model, sgd, AdaCons(), granularity="tensor")
    with pytest.raises(ValueError, match="is in granularity twice"):
        attach(model, sgd, AdaCons(), granularity=[[module[0].weight], [module[0].weight]])
    with pytest.raises(ValueError, match="none of the model's parameters"):
        attach(model, torch.optim.SGD(network().parameters(), lr=0.1), AdaCons())
    attach(model, sgd, None)  # leaves everything as it is
    assert not hasattr(sgd, "report")
    attach(model, sgd, AdaCons())
    with pytest.raises(RuntimeError, match="a communication hook already"):
        attach(model, torch.optim.SGD(module.parameters(), lr=0.1), AdaCons())
    with pytest.raises(ValueError, match="this optimizer has an aggregator already"):
        attach(wrap(network()), sgd, AdaCons())
    delayed = wrap(
        network(), delay_all_reduce_named_params=[], param_to_hook_all_reduce=torch.nn.Parameter(torch.ones(1))
    )
    delayed._delay_all_reduce_params = [torch.ones(1)]
    with pytest.raises(ValueError, match="delay_all_reduce_named_params"):
        attach(delayed, torch.optim.SGD(delayed.parameters(), lr=0.1), AdaCons())
    mixed = wrap(network())
    mixed.mixed_precision = object()
    with pytest.raises(ValueError, match="mixed_precision"):
        attach(mixed, torch.optim.SGD(mixed.parameters(), lr=0.1), AdaCons())


def test_what_cannot_be(cluster):
    cluster.run(refusals)


# --- one process --------------------------------------------------------------------------------


def alone() -> None:
    from ddp_job import network, train

    for schedule in ("two-pass", "one-pass", "gather", "auto"):
        optimizer = train(network(), schedule=schedule)
        assert optimizer.report.fallbacks == 0


@pytest.mark.ranks(1, launcher="torchrun")
def test_one_process(cluster):
    cluster.run(alone)
