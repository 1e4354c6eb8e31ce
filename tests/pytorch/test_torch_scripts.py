"""Scripts as people write them: schedulers, scalers, closures and whatever else sits on an optimizer.

Each ends with the same parameters on all ranks, and without a rank that trained alone: what one rank adds to its data
shows on all. One line adds an optimizer, a scheduler or a form of the AMP loop.
"""

from __future__ import annotations

import pytest

pytestmark = [pytest.mark.ranks(2, launcher="gloo"), pytest.mark.time_limit(180)]


def distributed(make, model, **arguments):
    """The optimizer that ``make`` makes of the model's parameters, distributed."""
    import adacons_hvd.torch as hvd
    from adacons_hvd import AdaCons

    hvd.init()
    arguments.setdefault("aggregator", AdaCons())
    return hvd.DistributedOptimizer(make(model.parameters()), model.named_parameters(), **arguments)


def sgd(parameters):
    import torch

    return torch.optim.SGD(parameters, lr=0.01)


def test_every_optimizer_of_torch(cluster):
    def case():
        import torch
        from torch_job import Batches, assert_equal_bits, loss_of, network
        from torch_lists import OPTIMIZERS, trained_by

        for name in OPTIMIZERS:
            model, batches = network(), Batches()
            parameters = trained_by(name, model)
            named = [(n, p) for n, p in model.named_parameters() if any(p is q for q in parameters)]
            import adacons_hvd.torch as hvd
            from adacons_hvd import AdaCons

            hvd.init()
            inner = getattr(torch.optim, name)(parameters, lr=0.01)
            optimizer = hvd.DistributedOptimizer(inner, named, aggregator=AdaCons())
            assert optimizer is inner

            def closure(optimizer=optimizer, model=model, batches=batches):
                optimizer.zero_grad()
                loss = loss_of(model, batches)
                loss.backward()
                return loss

            for _ in range(3):
                if name == "LBFGS":
                    optimizer.step(closure)
                else:
                    closure()
                    optimizer.step()
                model.zero_grad()
            assert_equal_bits(parameters)
            assert optimizer.report.steps >= 3, name
        return OPTIMIZERS

    (names, _) = cluster.run(case)
    assert {"SGD", "Adam", "AdamW", "LBFGS", "RMSprop"} <= set(names)


@pytest.mark.parametrize("made_for", ["base", "distributed"])
def test_every_learning_rate_scheduler_in_both_orders(cluster, made_for):
    """With ``model.zero_grad()`` and with the optimizer's; a checkpoint is loaded half-way."""

    def case():
        import copy
        import warnings

        import torch
        from torch_job import Batches, assert_equal_bits, loss_of, network
        from torch_lists import LR, SCHEDULERS, advance, names_of, scheduler_for

        known = names_of(LR, LR.LRScheduler, without=("LRScheduler",))
        unlisted = [name for name in known if name not in SCHEDULERS]
        for name in SCHEDULERS:
            model, batches = network(), Batches()
            base = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
            scheduler = scheduler_for(name, base) if made_for == "base" else None
            optimizer = distributed(lambda _, base=base: base, model)
            scheduler = scheduler or scheduler_for(name, optimizer)
            twin_of = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.01, momentum=0.9)
            twin = scheduler_for(name, twin_of)
            rates, expected = [], []
            with warnings.catch_warnings():
                warnings.filterwarnings("error", message=".*lr_scheduler.step.*|.*overridden after.*")
                for step in range(5):
                    (model if step % 2 else optimizer).zero_grad()
                    loss_of(model, batches).backward()
                    optimizer.step()
                    if step == 2:
                        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
                    with warnings.catch_warnings():
                        warnings.simplefilter("ignore")
                        twin_of.step()
                        for s, o, seen in ((scheduler, optimizer, rates), (twin, twin_of, expected)):
                            advance(s)
                            seen.append(o.param_groups[0]["lr"])
            assert rates == expected, name
            assert optimizer.report.steps == 5, name
            assert_equal_bits(list(model.parameters()))
        return unlisted

    assert cluster.run(case) == [[]] * 2


def test_whatever_else_was_put_on_the_instance_acts_on_aggregated_gradients(cluster):
    """A profiler's and a clipping wrapper's own step(), put on the optimizer before it is distributed and after."""

    def case():
        import torch
        from torch_job import Batches, assert_equal_bits, loss_of, network

        seen = []
        for when in ("before", "after"):
            model, batches = network(), Batches()
            parameters, lengths = list(model.parameters()), []

            def wrap(optimizer, parameters=parameters, lengths=lengths):
                inner = optimizer.step

                def step(*args, **kwargs):
                    lengths.append(float(torch.nn.utils.get_total_norm([p.grad for p in parameters])))
                    return inner(*args, **kwargs)

                optimizer.step = step

            base = sgd(parameters)
            if when == "before":
                wrap(base)
            optimizer = distributed(lambda _, base=base: base, model)
            if when == "after":
                wrap(optimizer)
            for _ in range(3):
                optimizer.zero_grad()
                loss_of(model, batches).backward()
                optimizer.step()
            assert_equal_bits(parameters)
            assert optimizer.report.steps == 3
            seen.append(lengths)
        # Before the distributed step gradients are this rank's own, and longer than a unit.
        return max(seen[0]) < 1.01, min(seen[1]) > 1.01

    assert cluster.run(case) == [(True, True)] * 2


def amp_loop(optimizers, models, scaler, batches, *, form="plain", passes=1, step=0, overflow=False):
    """One iteration of the loops in PyTorch's AMP examples; returns how far parameters went, by their learning rate."""
    import torch
    from torch_job import loss_of

    for optimizer in optimizers:
        optimizer.zero_grad()
    before = [[p.detach().clone() for p in model.parameters()] for model in models]
    for _ in range(passes):
        for model in models:
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=form == "autocast"):
                loss = loss_of(model, batches).float() / passes
            scaler.scale(loss * float("inf") if overflow else loss).backward()
    for optimizer, model in zip(optimizers, models, strict=True):
        if form in ("unscale", "explicit"):
            if form == "explicit":
                optimizer.synchronize()
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1e6)
        if form == "explicit":
            with optimizer.skip_synchronize():
                scaler.step(optimizer)
        else:
            scaler.step(optimizer)
    scaler.update()
    return [
        float(torch.nn.utils.get_total_norm([a - b.detach() for a, b in zip(old, model.parameters(), strict=True)]))
        / 0.01
        for old, model in zip(before, models, strict=True)
    ]


@pytest.mark.parametrize("told", [True, False], ids=["grad_scaler", "not told"])
def test_the_amp_loop_in_every_form_that_pytorch_documents(cluster, told):
    """The step is as long as without a loss scale, and infinity on one rank makes all leave the step out."""

    def case():
        import torch
        from torch_job import Batches, assert_equal_bits, loss_of, network

        import adacons_hvd.torch as hvd
        from adacons_hvd import AdaCons

        hvd.init()
        forms = ["plain", "unscale", "autocast", *(["explicit"] if told else [])]
        # Both kinds of steps have either number of passes, and of optimizers, and either scale, with some form.
        for number, (form, often) in enumerate((form, often) for form in forms for often in (False, True)):
            fused, scale = (number + number // 2) % 2 == 1, ("unit", "average")[number // 2 % 2]
            passes, count = (2, 2) if often else (1, 1)
            scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3)
            models, batches = [network(seed) for seed in range(count)], Batches()
            optimizers = [
                distributed(
                    lambda parameters, fused=fused: torch.optim.SGD(parameters, lr=0.01, fused=fused),
                    model,
                    aggregator=AdaCons(scale=scale),
                    grad_scaler=scaler if told else None,
                )
                for model in models
            ]
            plain = [network(seed) for seed in range(count)]
            alone = Batches()
            own = [
                distributed(
                    lambda parameters: torch.optim.SGD(parameters, lr=0.01), model, aggregator=AdaCons(scale=scale)
                )
                for model in plain
            ]
            off = torch.amp.GradScaler("cpu", enabled=False)
            for step in range(4):
                overflow = step == 1 and hvd.rank() == 1
                moved = amp_loop(optimizers, models, scaler, batches, form=form, passes=passes, overflow=overflow)
                if step == 1:
                    for model in [m for _ in range(passes) for m in plain]:
                        loss_of(model, alone)  # passes over the same numbers
                    assert moved == [0.0] * count, (form, fused, moved)
                    continue
                expected = amp_loop(
                    own, plain, off, alone, form="autocast" if form == "autocast" else "plain", passes=passes
                )
                tolerance = 0.2 if form == "autocast" else 1e-3
                assert moved == pytest.approx(expected, rel=tolerance), (form, fused, scale, step)
            assert_equal_bits([p for model in models for p in model.parameters()])
            assert_equal_bits([torch.tensor(scaler.get_scale())])
        return scaler.get_scale()

    assert cluster.run(case) == [512.0] * 2


def test_synchronize_before_unscaling_without_the_scaler_is_refused(cluster):
    def case():
        import torch
        from torch_job import Batches, loss_of, network

        model = network()
        optimizer = distributed(sgd, model)
        scaler = torch.amp.GradScaler("cpu")
        scaler.scale(loss_of(model, Batches())).backward()
        optimizer.synchronize()
        with pytest.raises(RuntimeError, match="without knowing their scale"):
            scaler.unscale_(optimizer)
        other = distributed(sgd, network(1), grad_scaler=torch.amp.GradScaler("cpu"))
        with pytest.raises(ValueError, match="another GradScaler"):
            other._adacons_unscaling(scaler)

    cluster.run(case)


def test_a_line_search_decides_by_the_mean_of_the_losses(cluster):
    """Each rank's closure returns its own loss; with strong_wolfe ranks would search along different lines."""

    def case():
        import harness
        import torch
        from torch_job import Batches, assert_equal_bits, network

        from adacons_hvd import AdaCons

        model, batches = network(), Batches()
        x = batches(8, 6)
        target = batches(8, 1) * (1 + 5 * harness.rank())

        def lbfgs(parameters):
            return torch.optim.LBFGS(parameters, lr=0.5, line_search_fn="strong_wolfe")

        optimizer = distributed(lbfgs, model, aggregator=AdaCons(scale="average"))

        def closure():
            optimizer.zero_grad()
            loss = (model(x) - target).square().mean()
            loss.backward()
            return loss

        own = float(closure().detach())
        optimizer.synchronize()
        first = float(optimizer.step(closure))
        mean = sum(harness.gather(own)) / harness.size()
        last = [float(optimizer.step(closure)) for _ in range(3)][-1]
        assert_equal_bits(list(model.parameters()))
        return first == pytest.approx(mean, rel=1e-6), last < first, last

    (a, b) = cluster.run(case)
    assert a == b
    assert a[:2] == (True, True)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copying_says_what_to_do(cluster, how):
    def case():
        import copy
        import io
        import pickle

        import torch
        from torch_job import network

        optimizer = distributed(sgd, network())
        act = {
            "deepcopy": copy.deepcopy,
            "pickle": pickle.dumps,
            "torch.save": lambda thing: torch.save(thing, io.BytesIO()),
        }[how]
        with pytest.raises(TypeError, match=r"cannot be copied or pickled.*state_dict\(\)"):
            act(optimizer)

    cluster.run(case)


def test_parameters_of_every_kind_are_broadcast_and_so_is_every_optimizers_state(cluster):
    def case():
        import harness
        import torch
        from torch_job import Batches, assert_equal_bits, loss_of, network

        import adacons_hvd.torch as hvd

        hvd.init()
        rank = harness.rank()
        tensors = {
            "bfloat16": torch.full((3, 3), rank, dtype=torch.bfloat16),
            "complex": torch.full((5,), complex(rank, 1)),
            "channels last": torch.full((2, 3, 4, 5), float(rank)).to(memory_format=torch.channels_last),
            "bool": torch.full((3,), rank == 0),
            "empty": torch.zeros(0),
            "scalar": torch.tensor(float(rank)),
            "no tensor": "left alone",
        }
        strides = tensors["channels last"].stride()
        hvd.broadcast_parameters(tensors, root_rank=1)
        assert tensors["channels last"].stride() == strides
        assert_equal_bits([t for t in tensors.values() if torch.is_tensor(t)])
        assert float(tensors["scalar"]) == 1.0
        states = []
        for name in ("SGD", "Adam", "LBFGS", "Adagrad"):
            model = network().bfloat16()
            hvd.broadcast_parameters(model.named_parameters(), root_rank=0)
            inner = getattr(torch.optim, name)(model.parameters(), lr=0.1 * (1 + rank))
            if rank == 0:  # the others have no state yet
                inner.step(lambda m=model: [loss_of(m, Batches(dtype=torch.bfloat16)).backward(), torch.zeros(())][1])
            hvd.broadcast_parameters(model.state_dict(), root_rank=0)
            optimizer = distributed(lambda _, inner=inner: inner, model)
            kept = [p.detach().clone() for p in model.parameters()]
            hvd.broadcast_optimizer_state(optimizer, root_rank=0)
            assert all(torch.equal(a, b) for a, b in zip(kept, model.parameters(), strict=True))
            inside = [v for s in inner.state.values() for v in s.values() if torch.is_tensor(v) and v.numel()]
            assert_equal_bits(inside)
            states.append((name, len(inside), inner.param_groups[0]["lr"]))
        return states

    (here, there) = cluster.run(case)
    assert here == there
    assert {name: rate for name, _, rate in here} == dict.fromkeys(("SGD", "Adam", "LBFGS", "Adagrad"), 0.1)


def test_a_compiled_step_is_aggregated(cluster):
    """``torch.compile`` around the optimizer's step, and around a function that takes it; our part is not compiled."""

    def case():
        import torch
        from torch._dynamo.convert_frame import input_codes
        from torch_job import Batches, assert_equal_bits, loss_of, network

        for compile_what in ("step", "function"):
            model, batches = network(), Batches()
            optimizer = distributed(sgd, model)

            def train(optimizer=optimizer, model=model, batches=batches):
                optimizer.zero_grad()
                loss_of(model, batches).backward()
                optimizer.step()

            step = torch.compile(optimizer.step, backend="eager")
            compiled = torch.compile(train, backend="eager")
            for _ in range(3):
                if compile_what == "function":
                    compiled()
                else:
                    optimizer.zero_grad()
                    loss_of(model, batches).backward()
                    step()
            assert optimizer.report.steps == 3
            assert_equal_bits(list(model.parameters()))
        compiled_files = {code.co_filename for code in (seen() for seen in input_codes.seen) if code is not None}
        ours = {file.partition("/adacons_hvd/")[2] for file in compiled_files} - {""}
        assert ours == {"torch/optimizer.py"}, ours

    cluster.run(case, timeout=180)
