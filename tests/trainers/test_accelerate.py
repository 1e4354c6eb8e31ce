"""Accelerate: attach() takes what prepare() returned."""

from __future__ import annotations

import pytest

pytestmark = [pytest.mark.ranks(2, launcher="torchrun", pool="trainers"), pytest.mark.time_limit(180)]


def prepared(**options):
    """An accelerator, and what it prepared: modules, models, optimizers and the data."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from torch.utils.data import DataLoader
    from trainer_job import BATCH, dataset, network, optimizer_of

    AcceleratorState._reset_state()
    accelerator = Accelerator(cpu=True, **options)
    module = network()
    data = DataLoader(dataset(), batch_size=BATCH)
    model, optimizer, data = accelerator.prepare(module, optimizer_of(module), data)
    return accelerator, module, model, optimizer, data


def train(accelerator, model, optimizer, data, clip=None):
    from trainer_job import loss_of

    for batch in data:
        with accelerator.accumulate(model):
            with accelerator.autocast():
                loss = loss_of(model, batch)
            accelerator.backward(loss)
            if clip is not None and accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            optimizer.zero_grad()


@pytest.mark.parametrize("kind", ["plain", "bf16", "compiled"])
def test_accumulating_and_clipping(cluster, kind):
    def case():
        import torch
        from trainer_job import assert_same, batches_by_turns

        import adacons_hvd.ddp
        from adacons_hvd import AdaCons

        options = {"bf16": {"mixed_precision": "bf16"}, "compiled": {"dynamo_backend": "eager"}}.get(kind, {})
        by_hand = {"dtype": torch.bfloat16} if kind == "bf16" else {}
        accelerator, module, model, optimizer, data = prepared(gradient_accumulation_steps=2, **options)
        adacons_hvd.ddp.attach(model, optimizer, AdaCons())
        train(accelerator, model, optimizer, data, clip=0.5)
        assert optimizer.report.steps == 6
        assert_same(module, batches_by_turns(), accumulate=2, clip=0.5, **by_hand)

    cluster.run(case)


def test_the_loss_scaler_is_that_of_the_optimizer(cluster):
    """By itself Accelerate refuses fp16 on a CPU, so here the optimizer and the accelerator are given the scaler."""

    def case():
        import torch
        from trainer_job import assert_same, batches_by_turns, loss_of, overflowing_scaler

        import adacons_hvd.ddp
        from adacons_hvd import AdaCons

        accelerator, module, model, optimizer, data = prepared()
        accelerator.scaler = overflowing_scaler()
        optimizer.__init__(optimizer.optimizer, device_placement=False, scaler=accelerator.scaler)
        adacons_hvd.ddp.attach(model, optimizer, AdaCons())
        skipped = 0
        for batch in data:
            with torch.autocast("cpu", torch.float16):
                loss = loss_of(model, batch)
            accelerator.backward(loss)
            optimizer.step()
            skipped += optimizer.step_was_skipped
            optimizer.zero_grad()
        assert 0 < skipped < 12
        assert_same(module, batches_by_turns(), dtype=torch.float16, scaled=True)

    cluster.run(case)


def test_resuming_is_bit_for_bit(cluster, tmp_path):
    def case():
        from accelerate import DistributedDataParallelKwargs
        from trainer_job import assert_same, batches_by_turns, bits_of_all_ranks, epochs, loss_of

        import adacons_hvd.ddp
        from adacons_hvd import AdaCons

        settings = {"kwargs_handlers": [DistributedDataParallelKwargs(find_unused_parameters=True)]}
        accelerator, module, model, optimizer, data = prepared(**settings)
        adacons_hvd.ddp.attach(model, optimizer, AdaCons())
        train(accelerator, model, optimizer, data)
        accelerator.save_state(tmp_path)
        model.eval()
        accelerator.gather_for_metrics([loss_of(model, batch).detach() for batch in data])
        model.train()
        train(accelerator, model, optimizer, data)
        assert_same(module, list(epochs(batches_by_turns(), 2)), find_unused_parameters=True)

        accelerator, resumed, model, optimizer, data = prepared(**settings)
        adacons_hvd.ddp.attach(model, optimizer, AdaCons())
        accelerator.load_state(tmp_path)
        train(accelerator, model, optimizer, data)
        assert optimizer.report.steps == 24
        assert bits_of_all_ranks(resumed) == bits_of_all_ranks(module)

    cluster.run(case)


def test_two_models_with_an_optimizer_each(cluster):
    def case():
        import torch
        from trainer_job import assert_same, batches_by_turns, bits_of_all_ranks, loss_of

        import adacons_hvd.ddp
        from adacons_hvd import AdaCons

        accelerator, module, model, optimizer, data = prepared()
        second = torch.nn.Linear(6, 2)
        model_2, optimizer_2 = accelerator.prepare(second, torch.optim.SGD(second.parameters(), lr=0.1))
        adacons_hvd.ddp.attach(model, optimizer, AdaCons())
        adacons_hvd.ddp.attach(model_2, optimizer_2, AdaCons(scale="average"))
        for batch in data:
            for each, its in ((model, optimizer), (model_2, optimizer_2)):
                accelerator.backward(loss_of(each, batch))
                its.step()
                its.zero_grad()
        assert_same(module, batches_by_turns())
        bits_of_all_ranks(second)
        assert optimizer_2.report.steps == 12

    cluster.run(case)


def test_what_cannot_be_is_refused_at_once(cluster):
    def case():
        import pytest
        from accelerate import DistributedDataParallelKwargs
        from accelerate.utils import DDPCommunicationHookType

        import adacons_hvd.ddp
        from adacons_hvd import AdaCons

        _, module, _, optimizer, _ = prepared()
        with pytest.raises(TypeError, match="model must be a DistributedDataParallel, got Sequential: wrap the module"):
            adacons_hvd.ddp.attach(module, optimizer, AdaCons())
        hook = DistributedDataParallelKwargs(comm_hook=DDPCommunicationHookType.FP16)
        _, _, model, optimizer, _ = prepared(kwargs_handlers=[hook])
        with pytest.raises(RuntimeError, match="has a communication hook already"):
            adacons_hvd.ddp.attach(model, optimizer, AdaCons())

    cluster.run(case)
