"""Loss scaling: every loop that PyTorch documents takes the steps that the same loop takes without a scaler."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch

pytestmark = [pytest.mark.ranks(3, launcher="torchrun"), pytest.mark.time_limit(120)]

STEPS = 6
#: In this step rank 1 alone has an infinite gradient.
OVERFLOW = 2


class Loop:
    """One training, with a loss scaler or without."""

    def __init__(self, scaled: bool, fused: bool, scale: str, enabled: bool = True) -> None:
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=2, enabled=enabled and scaled)
        self.fused, self.scale = fused, scale
        self.models: list[Any] = []
        self.optimizers: list[Any] = []

    def model(self, seed: int = 0) -> Any:
        from ddp_job import network, wrap

        self.models.append(wrap(network(seed, torch.float64)))
        return self.models[-1]

    def optimizer(self, parameters: Iterator[Any] | list[Any]) -> Any:
        self.optimizers.append(torch.optim.SGD(parameters, lr=0.02, fused=self.fused))
        return self.optimizers[-1]

    def attach(self, model: Any, optimizer: Any) -> None:
        import adacons_hvd.ddp
        from adacons_hvd import AdaCons

        adacons_hvd.ddp.attach(model, optimizer, AdaCons(scale=self.scale), grad_scaler=self.scaler)

    def loss(self, model: Any, step: int) -> torch.Tensor:
        import harness
        from ddp_job import loss_of

        loss = loss_of(model, step)
        if step == OVERFLOW and harness.rank() == 1:
            loss = loss + model.module[0].bias.sum() * float("inf")
        return loss

    def step(self, *optimizers: Any) -> None:
        """Step as a scaler does; without one, that is to leave out steps along infinity."""
        for optimizer in optimizers:
            if self.scaler.is_enabled():
                self.scaler.step(optimizer)
            elif all(p.grad.isfinite().all() for group in optimizer.param_groups for p in group["params"]):
                optimizer.step()
        self.scaler.update()


def plain(loop: Loop) -> None:
    model = loop.model()
    optimizer = loop.optimizer(model.parameters())
    loop.attach(model, optimizer)
    for step in range(STEPS):
        optimizer.zero_grad()
        before = [p.detach().clone() for p in model.parameters()]
        loop.scaler.scale(loop.loss(model, step)).backward()
        loop.step(optimizer)
        moved = sum(float((p - q).square().sum()) for p, q in zip(model.parameters(), before, strict=True)) ** 0.5
        if loop.scale == "unit":
            assert (moved == 0) if step == OVERFLOW else (0.5 * 0.02 < moved < 2 * 0.02)


def clipped(loop: Loop) -> None:
    model = loop.model()
    optimizer = loop.optimizer(model.parameters())
    loop.attach(model, optimizer)
    for step in range(STEPS):
        optimizer.zero_grad()
        loop.scaler.scale(loop.loss(model, step)).backward()
        loop.scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.3)
        loop.step(optimizer)


def accumulated(loop: Loop) -> None:
    model = loop.model()
    optimizer = loop.optimizer(model.parameters())
    loop.attach(model, optimizer)
    for step in range(STEPS):
        optimizer.zero_grad()
        for number in range(3):
            with nullcontext() if number == 2 else model.no_sync():
                loss = loop.loss(model, step if number == 1 else 10 * (step + 1) + number) / 3
                loop.scaler.scale(loss).backward()
        if step % 2:
            loop.scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.3)
        loop.step(optimizer)


def two_models(loop: Loop) -> None:
    """Under one scaler; infinity in the first keeps the second from no step."""
    models = [loop.model(0), loop.model(1)]
    optimizers = [loop.optimizer(model.parameters()) for model in models]
    for model, optimizer in zip(models, optimizers, strict=True):
        loop.attach(model, optimizer)
    for step in range(STEPS):
        for optimizer in optimizers:
            optimizer.zero_grad()
        first = loop.loss(models[0], step)
        second = loop.loss(models[1], 100 if step == OVERFLOW else step)
        loop.scaler.scale(first).backward()
        loop.scaler.scale(second).backward()
        loop.scaler.unscale_(optimizers[0])
        loop.step(*optimizers)


def two_optimizers(loop: Loop) -> None:
    """Each has half of the parameters of one model."""
    model = loop.model()
    parameters = list(model.parameters())
    optimizers = [loop.optimizer(parameters[:3]), loop.optimizer(parameters[3:])]
    loop.attach(model, optimizers[0])
    for step in range(STEPS):
        model.zero_grad()
        loop.scaler.scale(loop.loss(model, step)).backward()
        loop.step(*optimizers)


def autocast(loop: Loop) -> None:
    model = loop.model()
    optimizer = loop.optimizer(model.parameters())
    loop.attach(model, optimizer)
    for step in range(STEPS):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = loop.loss(model, step)
        loop.scaler.scale(loss).backward()
        loop.step(optimizer)


FORMS = (plain, clipped, accumulated, two_models, two_optimizers, autocast)


def as_without_a_scaler(form: Callable[[Loop], None]) -> None:
    import harness
    from ddp_job import assert_equal_bits

    # What is as long as the gradients shows whatever is left of a scale, so every scaler is tried with it.
    for scale, scalers in (("average", [(False, True), (True, True), (True, False)]), ("unit", [(False, True)])):
        reference = Loop(False, False, scale)
        form(reference)
        for fused, enabled in scalers:
            loop = Loop(True, fused, scale, enabled)
            form(loop)
            assert_equal_bits(p for model in loop.models for p in model.parameters())
            for model, other in zip(loop.models, reference.models, strict=True):
                for p, q in zip(model.parameters(), other.parameters(), strict=True):
                    torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)
            if enabled:
                scales = harness.gather(loop.scaler.get_scale())
                # Doubled after two steps, halved by the third, doubled after two more.
                assert set(scales) == {2.0**13}, scales


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_a_scaled_loop_steps_as_one_that_is_not(cluster, form):
    cluster.run(as_without_a_scaler, form)


# --- what would be wrong in silence -------------------------------------------------------------


def wrong_scaler(given: str, used: str, fused: bool) -> str:
    from ddp_job import assert_equal_bits, loss_of, network, wrap

    import adacons_hvd.ddp
    from adacons_hvd import AdaCons
    from adacons_hvd.agreement import DisagreementError

    model = wrap(network())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, fused=fused)
    scalers: dict[str, Any] = {"mine": torch.amp.GradScaler("cpu"), "other": torch.amp.GradScaler("cpu"), "none": None}
    adacons_hvd.ddp.attach(model, optimizer, AdaCons(), grad_scaler=scalers[given])
    before = [p.detach().clone() for p in model.parameters()]
    scaler = scalers[used]
    loss = loss_of(model, 0)
    (loss if scaler is None else scaler.scale(loss)).backward()
    with pytest.raises(DisagreementError) as raised:
        optimizer.step() if scaler is None else scaler.step(optimizer)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert_equal_bits(model.parameters())
    return str(raised.value)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(
    ("given", "used", "words"),
    [
        ("none", "mine", "attach() was given no grad_scaler, so scaled gradients were aggregated as if they were not"),
        ("other", "mine", "attach() was given another grad_scaler"),
        ("mine", "none", "attach() was given a grad_scaler, but step() was called without it"),
    ],
    ids=["not given", "another given", "given and not used"],
)
def test_a_scaler_that_attach_does_not_know_is_an_error(cluster, given, used, words, fused):
    for message in cluster.run(wrong_scaler, given, used, fused):
        assert message.startswith("ranks 0-2 cannot go on: ")
        assert words in message


def by_hand() -> None:
    """Unscaled by the scaler, stepped without it."""
    from ddp_job import assert_equal_bits, loss_of, network, wrap

    import adacons_hvd.ddp
    from adacons_hvd import AdaCons

    model = wrap(network())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    adacons_hvd.ddp.attach(model, optimizer, AdaCons(), grad_scaler=scaler)
    for step in range(3):
        optimizer.zero_grad()
        scaler.scale(loss_of(model, step)).backward()
        scaler.unscale_(optimizer)
        assert 0.5 < sum(float(p.grad.square().sum()) for p in model.parameters()) ** 0.5 < 2
        optimizer.step()
        scaler.update()
    assert_equal_bits(model.parameters())


def test_unscaled_by_hand(cluster):
    cluster.run(by_hand)
