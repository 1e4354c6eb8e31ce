"""The wrapped optimizer is the optimizer it wraps, and what Horovod's scripts do with it works."""

from __future__ import annotations

import pytest

pytestmark = [pytest.mark.ranks(2, launcher="gloo"), pytest.mark.time_limit(120)]


def wrapped(model, make=None, **arguments):
    import torch

    import adacons_hvd.torch as hvd
    from adacons_hvd import AdaCons

    hvd.init()
    inner = make(model.parameters()) if make else torch.optim.SGD(model.parameters(), lr=0.02)
    arguments.setdefault("aggregator", AdaCons())
    return hvd.DistributedOptimizer(inner, model.named_parameters(), **arguments)


def test_every_public_name_of_horovod_torch_is_there(cluster):
    def case():
        import horovod.torch as theirs

        import adacons_hvd.torch as ours

        public = [name for name in vars(theirs) if not name.startswith("_")]
        replaced = ["DistributedOptimizer", "broadcast_optimizer_state", "broadcast_parameters", "elastic", "init"]
        missing = [name for name in public if not hasattr(ours, name)]
        other = [name for name in public if name not in missing and getattr(ours, name) is not getattr(theirs, name)]
        missing += [name for name in vars(theirs.elastic) if name[0] != "_" and not hasattr(ours.elastic, name)]
        return missing, sorted(other), len(public) > 50, sorted(replaced)

    for missing, other, many, replaced in cluster.run(case):
        assert set(missing) <= {"init", "run_fn", "shutdown"}  # what horovod.torch.elastic itself uses
        assert set(other) == {*replaced, "optimizer"}
        assert many


@pytest.mark.ranks(2, launcher="mpi")  # Horovod has no Adasum over Gloo
def test_without_an_aggregator_it_is_horovods(cluster):
    """The same class, the same gradients bit for bit, also for Sum and Adasum."""

    def case():
        import horovod.torch as theirs
        import torch
        from torch_job import Batches, assert_equal_bits, loss_of, network

        import adacons_hvd.torch as ours

        theirs.init()
        for op in (theirs.Average, theirs.Sum, theirs.Adasum):
            ends = []
            for hvd in (theirs, ours):
                model, batches = network(), Batches()
                optimizer = hvd.DistributedOptimizer(
                    torch.optim.SGD(model.parameters(), lr=0.01), model.named_parameters(), op=op
                )
                scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
                assert type(optimizer).__module__ == "horovod.torch.optimizer"
                assert not hasattr(optimizer, "report")
                for _ in range(3):
                    optimizer.zero_grad()
                    loss_of(model, batches).backward()
                    optimizer.step()
                    scheduler.step()
                assert_equal_bits(list(model.parameters()))
                ends.append([p.detach().clone() for p in model.parameters()])
            assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))

    cluster.run(case)


def test_it_is_an_instance_of_the_wrapped_class_and_shares_its_state(cluster):
    def case():
        import torch
        from torch_job import Batches, loss_of, network

        class Careful(torch.optim.Adam):
            """An optimizer with something of its own that no param_group knows."""

            def __init__(self, params, note):
                super().__init__(params, lr=1e-3)
                self.note = note

        model, batches = network(), Batches()
        inner = Careful(model.parameters(), note="kept")
        loss_of(model, batches).backward()
        inner.step()  # it has gathered state already
        inner.zero_grad()
        import adacons_hvd.torch as hvd
        from adacons_hvd import AdaCons

        hvd.init()
        hvd.broadcast_parameters(model.state_dict(), root_rank=0)
        outer = hvd.DistributedOptimizer(inner, model.named_parameters(), aggregator=AdaCons())
        first = next(model.parameters())
        return (
            isinstance(outer, Careful),
            type(outer).__name__,
            outer.note,
            outer.state[first]["step"].item(),
            outer.param_groups is inner.param_groups,
            repr(outer).startswith("Careful ("),
            outer.aggregator,
        )

    from adacons_hvd import AdaCons

    expected = (True, "Careful", "kept", 1.0, True, True, AdaCons())
    assert cluster.run(case) == [expected] * 2


@pytest.mark.parametrize("made_for", ["inner", "outer"])
def test_learning_rate_schedulers(cluster, made_for):
    def case():
        import torch
        from torch_job import Batches, compare, loss_of, network

        import adacons_hvd.torch as hvd
        from adacons_hvd import AdaCons

        hvd.init()
        model, batches = network(dtype=torch.float64), Batches(dtype=torch.float64)
        inner = torch.optim.SGD(model.parameters(), lr=0.02)
        schedulers = [torch.optim.lr_scheduler.StepLR(inner, 2)] if made_for == "inner" else []
        optimizer = hvd.DistributedOptimizer(inner, model.named_parameters(), aggregator=AdaCons())
        schedulers = schedulers or [torch.optim.lr_scheduler.StepLR(optimizer, 2)]
        rates = []

        def after(_):
            rates.append(round(optimizer.param_groups[0]["lr"], 6))
            schedulers[0].step()

        parameters = list(model.parameters())
        # Through step() alone: skip_synchronize() would go around the step() that a scheduler puts on the instance.
        compare(
            optimizer,
            parameters,
            lambda _: loss_of(model, batches).backward(),
            after=after,
            by_step=True,
            tolerance=1e-4,
        )
        return rates

    assert cluster.run(case) == [[0.02, 0.02, 0.002, 0.002, 0.0002, 0.0002]] * 2


def test_clipping_between_synchronize_and_step(cluster):
    def case():
        import torch
        from torch_job import Batches, assert_equal_bits, loss_of, network

        model, batches = network(), Batches()
        parameters = list(model.parameters())
        optimizer = wrapped(model, lambda p: torch.optim.SGD(p, lr=1.0))
        for _ in range(3):
            optimizer.zero_grad()
            loss_of(model, batches).backward()
            optimizer.synchronize()
            torch.nn.utils.clip_grad_norm_(parameters, 0.01)
            before = [p.detach().clone() for p in parameters]
            with optimizer.skip_synchronize():
                optimizer.step()
            moved = sum((p - b).square().sum() for p, b in zip(parameters, before, strict=True))
            assert abs(moved.sqrt() - 0.01) < 1e-4
        assert_equal_bits(parameters)
        loss_of(model, batches).backward()
        optimizer.synchronize()
        with pytest.warns(UserWarning, match="a second time"):
            optimizer.step()
        assert_equal_bits(parameters)

    cluster.run(case)


@pytest.mark.parametrize("name", ["SGD", "Adam", "LBFGS"])
def test_closures(cluster, name):
    def case():
        import torch
        from torch_job import Batches, assert_equal_bits, loss_of, network

        import adacons_hvd.torch as hvd

        model = network()
        # LBFGS decides by the loss how often to evaluate, so the loss must be everyone's.
        optimizer = wrapped(
            model,
            lambda p: getattr(torch.optim, name)(p, lr=0.05),
            schedule="one-pass",
            aggregator=hvd.AdaCons(scale="average"),
        )
        evaluations = []

        def closure():
            optimizer.zero_grad()
            loss = loss_of(model, Batches())
            loss.backward()
            evaluations.append(loss.item())
            return hvd.allreduce(loss.detach(), name="loss")

        losses = []
        while len(losses) < 4:
            losses.append(optimizer.step(closure).item())
        assert_equal_bits(list(model.parameters()))
        assert len(evaluations) >= 4
        assert losses[-1] < losses[0]
        assert optimizer.report.steps == len(evaluations)

    cluster.run(case)


def test_zero_grad_at_the_wrong_moment_is_caught(cluster):
    def case():
        from torch_job import Batches, loss_of, network

        model, batches = network(), Batches()
        optimizer = wrapped(model)
        for _ in range(2):
            optimizer.zero_grad()
            loss_of(model, batches).backward()
            with pytest.raises(AssertionError, match="after backward"):
                optimizer.zero_grad()
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
        return [p.grad.abs().sum().item() for p in model.parameters()]

    assert cluster.run(case) == [[0.0] * 6] * 2


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "RMSprop", "Adagrad", "NAdam"])
def test_state_dicts_resume_bit_for_bit(cluster, name):
    def case(folder):
        import harness
        import torch
        from torch_job import Batches, assert_equal_bits, loss_of, network

        def make(parameters):
            options = {"momentum": 0.9} if name == "SGD" else {}
            return getattr(torch.optim, name)(parameters, lr=0.01, **options)

        def train(model, optimizer, batches, steps):
            for _ in range(steps):
                optimizer.zero_grad()
                loss_of(model, batches).backward()
                optimizer.step()

        model, batches = network(), Batches()
        optimizer = wrapped(model, make)
        train(model, optimizer, batches, 4)
        path = f"{folder}/{name}.{harness.rank()}.pt"
        torch.save([model.state_dict(), optimizer.state_dict()], path)
        draw = batches.generator.get_state()
        train(model, optimizer, batches, 4)

        again, later = network(), Batches()
        with torch.no_grad():
            for p in again.parameters():
                p.add_(1)
        resumed = wrapped(again, make)
        saved_model, saved_optimizer = torch.load(path, weights_only=True)
        again.load_state_dict(saved_model)
        resumed.load_state_dict(saved_optimizer)
        later.generator.set_state(draw)
        train(again, resumed, later, 4)
        for a, b in zip(model.parameters(), again.parameters(), strict=True):
            assert torch.equal(a, b)
        assert resumed.report.steps == optimizer.report.steps == 8
        assert_equal_bits(list(again.parameters()))

        # Either kind of checkpoint loads into either kind of optimizer.
        plain = make(network().parameters())
        plain.load_state_dict(saved_optimizer)
        wrapped(network(), make).load_state_dict(plain.state_dict())

    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        cluster.run(case, folder)


@pytest.mark.ranks(3, launcher="mpi")
def test_a_checkpoint_of_two_workers_resumes_with_three(cluster):
    def case():
        import harness
        import numpy as np
        import oracle
        import torch
        from torch_job import Batches, array, loss_of, network

        model, batches = network(), Batches()
        optimizer = wrapped(model)
        state = optimizer.state_dict()
        curve = torch.tensor([[0.5, 1.5]], dtype=torch.float64)
        one = torch.ones(1, 1, dtype=torch.float64)
        state["adacons"] = {
            "version": 1,
            "workers": 2,
            "steps": 7 * one,
            "fallbacks": 0 * one,
            "updates": 7 * one,
            "curve": curve,
        }
        optimizer.load_state_dict(state)
        loss_of(model, batches).backward()
        parameters = list(model.parameters())
        everyone = harness.gather([array(p.grad, p) for p in parameters])
        optimizer.synchronize()
        judge = oracle.Grouped([list(range(6))])
        judge.oracles[0].m = [0.5, 1.0, 1.5]
        found = [array(p.grad, p) for p in parameters]
        assert oracle.error(found, judge(everyone)) < 1e-5
        assert np.isclose(optimizer.report.steps, 8)
        return optimizer.state_dict()["adacons"]["workers"]

    assert cluster.run(case) == [3] * 3


@pytest.mark.ranks(2, launcher=("mpi", "gloo"))
@pytest.mark.parametrize("schedule", ["two-pass", "one-pass", "gather"])
def test_a_state_loaded_on_one_rank_alone_keeps_nobody_waiting(cluster, schedule):
    """That rank has to agree anew while the other is already sending."""

    def case():
        import harness
        from torch_job import Batches, assert_equal_bits, loss_of, network

        model, batches = network(), Batches()
        optimizer = wrapped(model, schedule=schedule, bucket_bytes=200)
        for step in range(6):
            if step == 2 + 2 * harness.rank():
                optimizer.load_state_dict(optimizer.state_dict())
            optimizer.zero_grad()
            loss_of(model, batches).backward()
            optimizer.step()
        assert_equal_bits(list(model.parameters()))
        return optimizer.report.schedule, optimizer.report.steps

    assert cluster.run(case) == [(schedule, 6)] * 2


@pytest.mark.parametrize("name", ["SGD", "Adam"])
@pytest.mark.parametrize("started", [False, True])
def test_broadcast_parameters_and_optimizer_state(cluster, name, started):
    """Ranks that differ in everything are made equal, the aggregator's momentum included."""

    def case():
        import torch
        from torch_job import Batches, assert_equal_bits, loss_of, network

        import adacons_hvd.torch as hvd

        hvd.init()
        model, batches = network(), Batches()
        with torch.no_grad():
            for p in model.parameters():
                p.add_(hvd.rank())
        options = {"momentum": 0.9} if name == "SGD" else {}
        optimizer = wrapped(model, lambda p: getattr(torch.optim, name)(p, lr=0.1 + hvd.rank(), **options))
        if started:
            loss_of(model, batches).backward()
            optimizer.step()
            optimizer.zero_grad()
            state = optimizer._reducer.state
            state.load_state_dict({**state.state_dict(), "curve": state.tensors()["curve"] + hvd.rank()})
        hvd.broadcast_parameters(model.state_dict(), root_rank=0)
        hvd.broadcast_optimizer_state(optimizer, root_rank=0)
        for _ in range(3):
            optimizer.zero_grad()
            loss_of(model, batches).backward()
            optimizer.step()
        assert_equal_bits(list(model.parameters()))
        assert_equal_bits([optimizer._reducer.state.tensors()["curve"]])
        return optimizer.param_groups[0]["lr"], optimizer.report.steps

    assert cluster.run(case) == [(0.1, 4 if started else 3)] * 2


def test_the_report(cluster):
    def case():
        import json

        from torch_job import Batches, loss_of, network

        model, batches = network(), Batches()
        optimizer = wrapped(model, schedule="one-pass", granularity="layer")
        assert optimizer.report is None
        for _ in range(3):
            optimizer.zero_grad()
            loss_of(model, batches).backward()
            optimizer.step()
        report = optimizer.report
        json.dumps(report.as_dict())
        assert list(report.coefficients) == ["first-order", "momentum", "normalized"]
        assert str(report).startswith("step 3 by one-pass: spread ")
        sums = [sum(row) for row in report.coefficients["normalized"]]
        assert all(abs(s - 1) < 1e-9 for s in sums)
        weights_times_norms = [
            sum(w * n for w, n in zip(*rows, strict=True)) for rows in zip(report.weights, report.norms, strict=True)
        ]
        assert all(abs(s - 1) < 1e-9 for s in weights_times_norms)
        return report.as_dict()

    first, second = cluster.run(case)
    assert first == second
    assert first["steps"] == 3
    assert len(first["weights"]) == 6
    assert first["schedule"] == "one-pass"
    assert first["reason"] == "asked for"
    assert all(spread > 0 for spread in first["spread"])


def test_two_optimizers_are_collected_when_dropped(cluster):
    def case():
        import gc
        import weakref

        from torch_job import Batches, loss_of, network

        model, batches = network(), Batches()
        optimizer = wrapped(model)
        loss_of(model, batches).backward()
        optimizer.step()
        reducer = weakref.ref(optimizer._reducer)
        del optimizer
        gc.collect()
        assert reducer() is None
        loss_of(model, batches).backward()  # its hooks do nothing now

    cluster.run(case)


def disagreement_of(optimizer):
    """The message every rank gets at this step, or that there was none."""
    from adacons_hvd.agreement import DisagreementError

    try:
        optimizer.step()
    except DisagreementError as error:
        return str(error)
    return "no error"


@pytest.mark.ranks(3, launcher=("mpi", "gloo"))
class TestDisagreement:
    """Found at the first step, and the same error on every rank; about settings, see `tests/conformance`."""

    def test_about_parameters_and_versions(self, cluster):
        cases = {
            "order": "first difference at number 0",
            "shape": "(3,) group 0 on ranks 0, 2; b torch.float32 (4,) group 0 on rank 1",
            "dtype": "torch.float32 (2,) group 0 on ranks 0, 2; a torch.float64",
            "count": "none on rank 1",
            "version": "adacons_hvd: ",
        }

        def case(difference):
            import torch

            import adacons_hvd.torch as hvd
            from adacons_hvd import AdaCons
            from adacons_hvd.engine import session

            hvd.init()
            odd = hvd.rank() == 1
            dtype = torch.float64 if odd and difference == "dtype" else torch.float32
            length = 4 if odd and difference == "shape" else 3
            named = [
                ("a", torch.nn.Parameter(torch.ones(2, dtype=dtype))),
                ("b", torch.nn.Parameter(torch.ones(length))),
            ]
            if odd and difference == "order":
                named.reverse()
            if odd and difference == "count":
                named.pop()
            version = session.__version__
            if odd and difference == "version":
                session.__version__ = "0.0.0"
            try:
                optimizer = hvd.DistributedOptimizer(
                    torch.optim.SGD([p for _, p in named], lr=0.1), named, aggregator=AdaCons()
                )
                sum(p.sum() for _, p in named).backward()
                return disagreement_of(optimizer)
            finally:
                session.__version__ = version

        for difference, text in cases.items():
            messages = cluster.run(case, difference)
            assert messages[0] == messages[1] == messages[2]
            assert text in messages[0]

    def test_about_having_an_aggregator_at_all(self, cluster):
        def case():
            from torch_job import Batches, loss_of, network

            import adacons_hvd.torch as hvd

            hvd.init()
            model, batches = network(), Batches()
            optimizer = wrapped(model, **({"aggregator": None} if hvd.rank() == 1 else {}))
            # As scripts do before their first step; nobody may wait for anybody here.
            hvd.broadcast_parameters(model.state_dict(), root_rank=0)
            hvd.broadcast_optimizer_state(optimizer, root_rank=0)
            loss_of(model, batches).backward()
            return disagreement_of(optimizer)

        # Horovod's own optimizer has begun to average by then, so these processes are used up.
        messages = cluster.run(case, fresh=True)
        assert messages[0] == messages[1] == messages[2]
        assert "None (Horovod's own reduction) on rank 1" in messages[0]

    def test_about_which_granularity_groups_there_are(self, cluster):
        def case():
            from torch_job import Batches, loss_of, network

            import adacons_hvd.torch as hvd

            hvd.init()
            model, batches = network(), Batches()
            parameters = list(model.parameters())
            optimizer = wrapped(model, granularity=[parameters[: 2 + hvd.rank() // 2]])
            loss_of(model, batches).backward()
            return disagreement_of(optimizer)

        messages = cluster.run(case)
        assert messages[0] == messages[1] == messages[2]
        assert "first difference at number 2: 2.weight" in messages[0]
        assert "group 1 on ranks 0-1" in messages[0]

    def test_about_the_order_of_two_optimizers(self, cluster):
        def case():
            from torch_job import Batches, loss_of, network

            import adacons_hvd.torch as hvd

            hvd.init()
            models, batches = [network(1), network(2)], Batches()
            optimizers = [wrapped(model) for model in models]
            first = hvd.rank() % 2
            loss_of(models[first], batches).backward()
            return disagreement_of(optimizers[first])

        messages = cluster.run(case)
        assert messages[0] == messages[1] == messages[2]
        assert "parameters, first difference at number 0" in messages[0]

    def test_that_arises_later(self, cluster):
        """One rank freezes a layer of its own accord."""

        def case():
            from torch_job import Batches, loss_of, network

            import adacons_hvd.torch as hvd

            hvd.init()
            model, batches = network(), Batches()
            optimizer = wrapped(model, schedule="one-pass")
            for step in range(3):
                if step == 2 and hvd.rank() == 2:
                    next(model.parameters()).requires_grad_(False)
                optimizer.zero_grad()
                loss_of(model, batches).backward()
                message = disagreement_of(optimizer)
            return message

        for message in cluster.run(case, fresh=True):
            assert "parameters, first difference at number 0" in message
