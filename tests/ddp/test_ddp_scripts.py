"""Scripts as people write them, with DDP: every optimizer and every scheduler of PyTorch's."""

from __future__ import annotations

import pytest

pytestmark = [pytest.mark.ranks(2, launcher="torchrun"), pytest.mark.time_limit(180)]


def test_every_optimizer_of_torch(cluster):
    def case():
        import torch
        from ddp_job import assert_equal_bits, loss_of, network, wrap
        from torch_lists import OPTIMIZERS, trained_by

        import adacons_hvd.ddp
        from adacons_hvd import AdaCons

        for name in OPTIMIZERS:
            model = wrap(network())
            parameters = trained_by(name, model)
            optimizer = getattr(torch.optim, name)(parameters, lr=0.01)
            adacons_hvd.ddp.attach(model, optimizer, AdaCons())
            for step in range(2):

                def closure(model=model, optimizer=optimizer, step=step):
                    optimizer.zero_grad()
                    loss = loss_of(model, step)
                    loss.backward()
                    mean = loss.detach().clone()
                    torch.distributed.all_reduce(mean)
                    return mean / torch.distributed.get_world_size()

                if name == "LBFGS":
                    optimizer.step(closure)
                else:
                    closure()
                    optimizer.step()
            assert_equal_bits(parameters)
            assert optimizer.report.steps >= 2, name
        return OPTIMIZERS

    assert len(cluster.run(case)[0]) > 10


def test_every_learning_rate_scheduler_in_both_orders(cluster):
    def case():
        import itertools

        import torch
        from ddp_job import assert_equal_bits, loss_of, network, wrap
        from torch_lists import SCHEDULERS, advance, scheduler_for

        import adacons_hvd.ddp
        from adacons_hvd import AdaCons

        for name, made_before in itertools.product(SCHEDULERS, [True, False]):
            model = wrap(network())
            optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
            scheduler = scheduler_for(name, optimizer) if made_before else None
            adacons_hvd.ddp.attach(model, optimizer, AdaCons())
            scheduler = scheduler or scheduler_for(name, optimizer)
            for step in range(2):
                optimizer.zero_grad()
                loss_of(model, step).backward()
                optimizer.step()
                advance(scheduler)
            assert_equal_bits(list(model.parameters()))
            assert optimizer.report.steps == 2, name

    cluster.run(case)
