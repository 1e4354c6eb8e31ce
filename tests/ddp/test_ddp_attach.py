"""attach() checks everything before it changes anything, and no rank waits in it for ever."""

from __future__ import annotations

import time
from datetime import timedelta
from typing import Any

import pytest
import torch

pytestmark = [pytest.mark.ranks(3, launcher="torchrun"), pytest.mark.time_limit(120)]


# --- ranks that do not come ---------------------------------------------------------------------


def absent(who: int, ranks: list[int], store: bool, late: bool) -> str:
    """Rank ``who`` does not come to attach(), or comes when the others have left."""
    import harness
    import torch.distributed as dist
    from ddp_job import network, start, wrap

    import adacons_hvd.ddp
    from adacons_hvd import AdaCons
    from adacons_hvd.agreement import DisagreementError
    from adacons_hvd.ddp import notes

    start()
    group = dist.new_group(ranks, timeout=timedelta(seconds=20))
    if harness.rank() not in ranks:
        return ""
    model = wrap(network(), process_group=group)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    if harness.rank() == who:
        if not late:
            return ""
        time.sleep(2)
    store_of = notes._store_of
    notes._store_of = store_of if store else lambda group, prefix: None
    began = time.monotonic()
    try:
        with pytest.raises(DisagreementError) as raised:
            adacons_hvd.ddp.attach(model, optimizer, AdaCons(), timeout=0.5)
    finally:
        notes._store_of = store_of
    assert time.monotonic() - began < 10
    assert untouched(model, optimizer)
    return str(raised.value)


def untouched(model: Any, optimizer: Any) -> bool:
    return (
        "comm_hook" not in model._get_ddp_logging_data()
        and not model._comm_hooks
        and not any(p._post_accumulate_grad_hooks for p in model.parameters())
        and not any(hooks for name, hooks in vars(optimizer).items() if name.endswith("_hooks"))
        and not hasattr(optimizer, "report")
        and not hasattr(optimizer, "aggregator")
    )


@pytest.mark.parametrize(("who", "ranks"), [(1, [0, 1, 2]), (0, [0, 1, 2]), (2, [0, 2])])
@pytest.mark.parametrize("late", [False, True], ids=["never", "late"])
def test_a_rank_that_does_not_come_is_named(cluster, who, ranks, late):
    messages = cluster.run(absent, who, ranks, True, late)
    for rank in ranks:
        if late or rank != who:
            assert messages[rank].startswith(f"rank {who} did not call adacons_hvd.ddp.attach() within 0.5 seconds")


def test_without_a_store_nobody_waits_for_ever_either(cluster):
    for message in cluster.run(absent, 1, [0, 1, 2], False, False)[::2]:
        assert message.startswith("some rank did not call adacons_hvd.ddp.attach() within 0.5 seconds")


def together_without_a_store() -> None:
    from ddp_job import network, train

    from adacons_hvd.ddp import notes

    store_of = notes._store_of
    notes._store_of = lambda group, prefix: None
    try:
        train(network())
    finally:
        notes._store_of = store_of


def test_without_a_store_ranks_can_meet(cluster):
    cluster.run(together_without_a_store)


def one_fails() -> str:
    """A rank whose call is wrong tells the others at once, and all can call again."""
    import harness
    from ddp_job import assert_equal_bits, loss_of, network, wrap

    import adacons_hvd.ddp
    from adacons_hvd import AdaCons
    from adacons_hvd.agreement import DisagreementError

    model = wrap(network())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    odd = harness.rank() == 1
    began = time.monotonic()
    with pytest.raises(ValueError if odd else DisagreementError) as raised:
        adacons_hvd.ddp.attach(model, optimizer, AdaCons(), schedule="ring" if odd else "auto")
    assert time.monotonic() - began < 10
    assert untouched(model, optimizer)
    adacons_hvd.ddp.attach(model, optimizer, AdaCons())
    loss_of(model, 0).backward()
    optimizer.step()
    assert_equal_bits(model.parameters())
    return str(raised.value)


def test_a_call_that_fails_on_one_rank_is_told_to_the_others(cluster):
    first, odd, last = cluster.run(one_fails)
    assert first == last == f"attach() failed on rank 1: ValueError: {odd}"


# --- arguments ----------------------------------------------------------------------------------

#: Arguments that are refused, given the model and its optimizer; and the one sentence that says so.
WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"model": torch.nn.Linear(1, 1)}, TypeError, "model must be a DistributedDataParallel, got Linear"),
    ({"optimizer": "adam"}, TypeError, "optimizer must be a torch.optim.Optimizer, got 'adam'"),
    ({"optimizer": None}, TypeError, "optimizer must be a torch.optim.Optimizer, got None"),
    ({"optimizer": []}, ValueError, "optimizer is an empty list"),
    ({"optimizer": [None]}, TypeError, "optimizer must be a torch.optim.Optimizer, got None"),
    ({"aggregator": 0.99}, TypeError, "aggregator must be an Aggregator such as AdaCons(), got 0.99"),
    ({"schedule": "ring"}, ValueError, "schedule must be one of auto, fast, "),
    ({"schedule": ["gather"]}, ValueError, "schedule must be one of auto, fast, "),
    ({"schedule": "ring", "aggregator": None}, ValueError, "schedule must be one of auto, fast, "),
    ({"granularity": "tensor"}, ValueError, "granularity must be "),
    ({"granularity": None}, ValueError, "granularity must be lists of parameters, got None"),
    ({"granularity": 4}, ValueError, "granularity must be lists of parameters, got 4"),
    ({"granularity": [4]}, ValueError, "granularity must be lists of parameters, found int in place of a list"),
    ({"granularity": [[torch.ones(2, 3)]]}, ValueError, "granularity names 1 parameter that this optimizer does not"),
    ({"grad_scaler": True}, TypeError, "grad_scaler must be the torch.amp.GradScaler in use, got True"),
    ({"check_replicas": -1}, ValueError, "check_replicas must be a whole number of steps"),
    ({"check_replicas": 2.5}, ValueError, "check_replicas must be a whole number of steps"),
    ({"check_replicas": True}, ValueError, "check_replicas must be a whole number of steps"),
    ({"may_differ": 4}, ValueError, "may_differ must be lists of parameters, found int in place of a list"),
    ({"may_differ": torch.ones(2)}, ValueError, "may_differ must be lists of parameters, found Tensor in place of a"),
    ({"may_differ": ["bias"]}, ValueError, "may_differ must hold parameters, found str"),
    ({"may_differ": [torch.ones(2)]}, ValueError, "may_differ names 1 parameter that this optimizer does not train"),
    ({"workers": "node"}, ValueError, 'workers must be "rank" or "host", got \'node\''),
    ({"workers": "host", "schedule": "gather"}, ValueError, 'workers="host" has a schedule of its own'),
    ({"timeout": 0}, ValueError, "timeout must be a positive number of seconds, got 0"),
    ({"timeout": "1"}, ValueError, "timeout must be a positive number of seconds, got '1'"),
    ({"timeout": float("inf")}, ValueError, "timeout must be a positive number of seconds, got inf"),
]


def refused() -> None:
    from ddp_job import assert_equal_bits, loss_of, network, wrap

    import adacons_hvd.ddp
    from adacons_hvd import AdaCons

    model = wrap(network())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    right = {"model": model, "optimizer": optimizer, "aggregator": AdaCons()}
    for arguments, kind, words in WRONG:
        with pytest.raises(kind) as raised:
            adacons_hvd.ddp.attach(**{**right, **arguments})
        message = str(raised.value)
        assert message.startswith(words), message
        assert "\n" not in message
        assert untouched(model, optimizer), words

    # Whatever else is wrong, nothing has changed; so the last call is fine.
    hooked = wrap(network())
    hooked._register_builtin_comm_hook(torch.distributed.BuiltinCommHookType.ALLREDUCE)
    theirs = torch.optim.SGD(hooked.parameters(), lr=0.1)
    with pytest.raises(RuntimeError, match="a communication hook already"):
        adacons_hvd.ddp.attach(hooked, theirs, AdaCons())
    assert not hooked._comm_hooks
    assert not hasattr(theirs, "report")
    adacons_hvd.ddp.attach(hooked, theirs, None)

    adacons_hvd.ddp.attach(**right, granularity=iter([[p] for p in model.parameters()]), may_differ=iter(()))
    loss_of(model, 0).backward()
    optimizer.step()
    assert_equal_bits(model.parameters())


def test_wrong_arguments_are_refused_in_a_sentence_before_anything_changes(cluster):
    cluster.run(refused)


def sharded() -> None:
    from ddp_job import assert_equal_bits, loss_of, network, start, wrap
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Replicate, distribute_tensor

    import adacons_hvd.ddp
    from adacons_hvd import AdaCons

    start()
    mesh = DeviceMesh("cpu", [0, 1, 2])
    module = network()
    fully_shard(module, mesh=mesh)
    with pytest.raises(TypeError, match="FSDPSequential has DTensor parameters, as fully_shard"):
        adacons_hvd.ddp.attach(module, torch.optim.SGD(module.parameters(), lr=0.1), AdaCons())

    # DDP refuses most of them itself, but not those that it need not make equal.
    module = network()
    whole = module[2].weight
    module[2].weight = torch.nn.Parameter(distribute_tensor(whole.detach(), mesh, [Replicate()]))
    model = wrap(module, init_sync=False)
    with pytest.raises(TypeError, match=r"parameter 2\.weight is a DTensor"):
        adacons_hvd.ddp.attach(model, torch.optim.SGD(model.parameters(), lr=0.1), AdaCons())

    module[2].weight = whole
    model = wrap(module)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    adacons_hvd.ddp.attach(model, optimizer, AdaCons())
    loss_of(model, 0).backward()
    optimizer.step()
    assert_equal_bits(model.parameters())


def test_sharded_parameters_are_refused(cluster):
    cluster.run(sharded)


# --- optimizers that wrap another ---------------------------------------------------------------


class Wrapper(torch.optim.Optimizer):
    """Built like Accelerate's: an optimizer that never called its own constructor."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    state = property(lambda self: self.optimizer.state)  # type: ignore[assignment]
    defaults = property(lambda self: self.optimizer.defaults)  # type: ignore[assignment]
    param_groups = property(lambda self: self.optimizer.param_groups)  # type: ignore[assignment]

    def state_dict(self) -> dict[str, Any]:
        return self.optimizer.state_dict()

    def load_state_dict(self, state_dict: Any) -> None:
        self.optimizer.load_state_dict(state_dict)

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.optimizer.zero_grad(set_to_none)

    def step(self, closure: Any = None) -> Any:
        return self.optimizer.step(closure)


class Constructed(Wrapper):
    """Another kind: one that did, and so has hooks and a state of its own."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        torch.optim.Optimizer.__init__(self, optimizer.param_groups, {})
        self.optimizer = optimizer

    state = defaults = param_groups = None  # type: ignore[assignment]
    state_dict = torch.optim.Optimizer.state_dict
    load_state_dict = torch.optim.Optimizer.load_state_dict


def accelerated(optimizer: torch.optim.Optimizer, scaler: Any = None) -> Any:
    from accelerate import Accelerator
    from accelerate.optimizer import AcceleratedOptimizer

    Accelerator(cpu=True)
    return AcceleratedOptimizer(optimizer, device_placement=False, scaler=scaler)


def wrapped(kind: Any) -> None:
    from ddp_job import assert_equal_bits, loss_of, network, wrap

    import adacons_hvd.ddp
    from adacons_hvd import AdaCons
    from adacons_hvd.engine.replicas import StrayStepError

    model = wrap(network())
    inner: Any = torch.optim.Adam(model.parameters(), lr=0.01)
    outer = kind(inner)
    # Nothing is changed by a call that fails.
    with pytest.raises(ValueError, match="granularity must be"):
        adacons_hvd.ddp.attach(model, outer, AdaCons(), granularity="tensor")
    aggregator = AdaCons()
    adacons_hvd.ddp.attach(model, outer, aggregator, check_replicas=1)
    assert outer.aggregator is inner.aggregator is aggregator
    assert outer.report is inner.report is None
    for step in range(3):
        outer.zero_grad()
        loss_of(model, step).backward()
        outer.step()
        assert outer.report is inner.report
        assert outer.report.steps == step + 1
    assert_equal_bits(model.parameters())

    saved = outer.state_dict()
    other = wrap(network())
    again = kind(torch.optim.Adam(other.parameters(), lr=0.01))
    for known in (outer, inner):
        with pytest.raises(ValueError, match="this optimizer has an aggregator already"):
            adacons_hvd.ddp.attach(other, known, AdaCons())
    adacons_hvd.ddp.attach(other, again, AdaCons())
    again.load_state_dict(saved)
    loss_of(other, 0).backward()
    again.step()
    assert again.report.steps == 4
    assert_equal_bits(other.parameters())

    outer.zero_grad()
    loss_of(model.module, 0).backward()
    with pytest.raises(StrayStepError):
        outer.step()
    assert_equal_bits(model.parameters())


@pytest.mark.parametrize("kind", [Wrapper, Constructed], ids=lambda kind: kind.__name__)
def test_an_optimizer_that_wraps_another(cluster, kind):
    cluster.run(wrapped, kind)


def several() -> None:
    """Two optimizers of one model, one of which leaves out every other step."""
    from ddp_job import assert_equal_bits, loss_of, network, wrap

    import adacons_hvd.ddp
    from adacons_hvd import AdaCons
    from adacons_hvd.engine.replicas import StrayStepError

    model = wrap(network())
    first, *others = model.parameters()
    both: Any = [torch.optim.SGD([first], lr=0.05), Wrapper(torch.optim.Adam(others, lr=0.01))]
    foreign = torch.optim.SGD(network().parameters(), lr=0.1)
    with pytest.raises(ValueError, match="none of the model's parameters"):
        adacons_hvd.ddp.attach(model, [both[0], foreign], AdaCons())
    adacons_hvd.ddp.attach(model, both, AdaCons())
    for step in range(4):
        model.zero_grad()
        loss_of(model, step).backward()
        for optimizer in both[: 1 + step % 2]:
            optimizer.step()
            assert optimizer.report.steps == step + 1
    assert_equal_bits(model.parameters())
    # Either state holds the memory, so whichever is loaded brings it.
    saved = [optimizer.state_dict() for optimizer in both]
    for number in range(2):
        other = wrap(network())
        first, *others = other.parameters()
        again: Any = [torch.optim.SGD([first], lr=0.05), torch.optim.Adam(others, lr=0.01)]
        adacons_hvd.ddp.attach(other, again, AdaCons())
        again[number].load_state_dict(saved[number])
        loss_of(other, 0).backward()
        assert again[0].report.steps == again[1].report.steps == 5
    model.zero_grad()
    loss_of(model.module, 0).backward()
    for optimizer in both:
        with pytest.raises(StrayStepError):
            optimizer.step()


def test_several_optimizers(cluster):
    cluster.run(several)


def accelerate_scaled() -> None:
    """Accelerate's wrapper steps with the scaler that it was given, and attach() finds it there."""
    from ddp_job import assert_equal_bits, loss_of, network, wrap

    import adacons_hvd.ddp
    from adacons_hvd import AdaCons

    for given in (True, False):
        model = wrap(network())
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        optimizer = accelerated(torch.optim.SGD(model.parameters(), lr=0.02), scaler)
        adacons_hvd.ddp.attach(model, optimizer, AdaCons(), grad_scaler=scaler if given else None)
        for step in range(3):
            optimizer.zero_grad()
            before = [p.detach().clone() for p in model.parameters()]
            scaler.scale(loss_of(model, step)).backward()
            optimizer.step()
            moved = sum(float((p - q).square().sum()) for p, q in zip(model.parameters(), before, strict=True)) ** 0.5
            assert 0.01 < moved < 0.04
        assert_equal_bits(model.parameters())


def test_accelerate(cluster):
    pytest.importorskip("accelerate")
    cluster.run(wrapped, accelerated)
    cluster.run(accelerate_scaled)
