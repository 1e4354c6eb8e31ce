"""Lightning's Trainer with AggregationCallback, and Fabric with attach()."""

from __future__ import annotations

import pytest

pytestmark = [pytest.mark.ranks(2, launcher="torchrun", pool="trainers"), pytest.mark.time_limit(180)]


@pytest.mark.parametrize("package", ["lightning", "pytorch_lightning"])
def test_accumulating_and_clipping(cluster, package):
    def case():
        import importlib

        from lightning_job import data, module_of, trainer
        from trainer_job import assert_same, rows_by_turns

        lightning = importlib.import_module(package)
        module = module_of(lightning)
        trainer(lightning, accumulate_grad_batches=2, gradient_clip_val=0.5).fit(module, data())
        assert_same(module, rows_by_turns(), accumulate=2, clip=0.5)

    cluster.run(case)


@pytest.mark.parametrize("kind", ["bf16", "fp16"])
def test_mixed_precision(cluster, kind):
    def case():
        import torch
        from lightning.pytorch.plugins import MixedPrecision
        from lightning_job import data, module_of, trainer
        from trainer_job import assert_same, overflowing_scaler, rows_by_turns

        # By itself Lightning takes bf16 in place of fp16 on a CPU; given the plugin, it does not.
        plugin = MixedPrecision("16-mixed", "cpu", overflowing_scaler())
        trainers = {"precision": "bf16-mixed"} if kind == "bf16" else {"plugins": [plugin]}
        by_hand = {"dtype": torch.bfloat16} if kind == "bf16" else {"dtype": torch.float16, "scaled": True}
        module = module_of()
        trainer(gradient_clip_val=0.5, **trainers).fit(module, data())
        assert_same(module, rows_by_turns(), clip=0.5, **by_hand)
        assert kind == "bf16" or plugin.scaler.get_scale() < overflowing_scaler().get_scale()

    cluster.run(case)


def test_resuming(cluster, tmp_path):
    """Bit for bit where DDP does not rearrange its buckets after the first step; else but for rounding."""

    def case():
        import torch
        from lightning.pytorch.callbacks import ModelCheckpoint
        from lightning_job import data, module_of, trainer
        from trainer_job import assert_same, bits_of_all_ranks, epochs, rows_by_turns

        from adacons_hvd import AdaCons
        from adacons_hvd.lightning import AggregationCallback

        for strategy in ("ddp", "ddp_find_unused_parameters_true"):
            saving = ModelCheckpoint(str(tmp_path / strategy), filename="{epoch}", save_top_k=-1)
            module = module_of()
            callbacks = [AggregationCallback(AdaCons()), saving]
            first = trainer(strategy=strategy, max_epochs=3, callbacks=callbacks, enable_checkpointing=True)
            first.fit(module, data(), data())
            assert len(module.scores) >= 3 * 12, "not evaluated in between"
            unused = strategy != "ddp"
            assert_same(module, list(epochs(rows_by_turns(), 3)), find_unused_parameters=unused)

            resumed = module_of()
            again = trainer(strategy=strategy, max_epochs=3)
            again.fit(resumed, data(), data(), ckpt_path=str(tmp_path / strategy / "epoch=0.ckpt"))
            assert again.optimizers[0].report.steps == 36
            for ours, theirs in zip(resumed.parameters(), module.parameters(), strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
            found = bits_of_all_ranks(resumed)
        assert found == bits_of_all_ranks(module)

    cluster.run(case)


def test_two_optimizers_take_turns(cluster):
    def case():
        import copy

        from lightning_job import Adversaries, data, trainer
        from trainer_job import bits, bits_of_all_ranks

        from adacons_hvd import AdaCons
        from adacons_hvd.lightning import AggregationCallback

        found = {}
        for name, aggregator in {"AdaCons": AdaCons(), "average": None}.items():
            module = Adversaries()
            groups = [list(module.maker.parameters()), list(module.judge.parameters())]
            callback = AggregationCallback(aggregator, granularity=groups)
            fit = trainer(callbacks=[callback], strategy="ddp_find_unused_parameters_true")
            fit.fit(module, data())
            found[name] = bits_of_all_ranks(module)
            saved = [copy.deepcopy(optimizer.state_dict()) for optimizer in fit.optimizers]
            assert ["adacons" in "".join(map(str, state)) for state in saved] == [aggregator is not None] * 2
        assert fit.optimizers[0].state_dict()
        assert len({*found.values(), bits(Adversaries())}) == 3

    cluster.run(case)


def test_a_compiled_module(cluster):
    def case():
        import torch
        from lightning_job import data, module_of, trainer
        from trainer_job import assert_same, rows_by_turns

        module = module_of()
        trainer().fit(torch.compile(module, backend="eager"), data())
        assert_same(module, rows_by_turns())

    cluster.run(case)


def test_the_trainers_logger_gets_the_report(cluster, tmp_path):
    def case():
        import csv

        import harness
        from lightning.pytorch.loggers import CSVLogger
        from lightning_job import data, module_of, trainer

        fit = trainer(logger=CSVLogger(str(tmp_path), name="", version="run"), log_every_n_steps=3)
        fit.fit(module_of(logs=True), data())
        harness.gather("written")
        with (tmp_path / "run" / "metrics.csv").open() as file:
            rows = list(csv.DictReader(file))
        ours = [row for row in rows if row["adacons/spread"]]
        assert [row["step"] for row in ours] == [row["step"] for row in rows if row["loss"]] == ["2", "5", "8", "11"]
        report = fit.optimizers[0].report
        assert float(ours[-1]["adacons/spread"]) == report.spread[0]
        assert float(ours[-1]["adacons/largest weight"]) > 1 > float(ours[-1]["adacons/smallest weight"])

    cluster.run(case)


def test_what_cannot_be_is_refused_at_once(cluster):
    def case():
        import pytest
        from lightning.fabric.plugins.environments import LightningEnvironment
        from lightning_job import data, module_of, trainer

        from adacons_hvd import AdaCons
        from adacons_hvd.lightning import AggregationCallback

        with pytest.raises(TypeError, match=r'needs Trainer\(strategy="ddp"\), and this Trainer\'s is SingleDevice'):
            trainer(strategy="auto", devices=1, plugins=[LightningEnvironment()]).fit(module_of(), data())
        with pytest.raises(ValueError, match="has an aggregator already"):
            trainer(callbacks=[AggregationCallback(AdaCons()) for _ in range(2)]).fit(module_of(), data())
        with pytest.raises(ValueError, match="granularity must be"):
            trainer(callbacks=[AggregationCallback(AdaCons(), granularity="tensor")]).fit(module_of(), data())

    cluster.run(case)


# --- Fabric -----------------------------------------------------------------------------------------


def train_with_fabric(fabric, model, optimizer, batches, accumulate=1, clip=None):
    from trainer_job import loss_of

    for number, batch in enumerate(batches, 1):
        last = number % accumulate == 0
        with fabric.no_backward_sync(model, enabled=not last):
            fabric.backward(loss_of(model, batch) / accumulate)
        if last:
            if clip is not None:
                fabric.clip_gradients(model, optimizer, max_norm=clip, error_if_nonfinite=False)
            optimizer.step()
            optimizer.zero_grad()


@pytest.mark.parametrize("kind", ["plain", "bf16", "fp16", "compiled"])
def test_fabric(cluster, kind):
    def case():
        import torch
        from lightning.fabric import Fabric
        from lightning.fabric.plugins import MixedPrecision
        from trainer_job import assert_same, network, optimizer_of, overflowing_scaler, rows_by_turns

        import adacons_hvd.ddp
        from adacons_hvd import AdaCons

        plugin = MixedPrecision("16-mixed", "cpu", overflowing_scaler())
        fabrics = {"bf16": {"precision": "bf16-mixed"}, "fp16": {"plugins": [plugin]}}.get(kind, {})
        by_hand = {"bf16": {"dtype": torch.bfloat16}, "fp16": {"dtype": torch.float16, "scaled": True}}.get(kind, {})
        fabric = Fabric(accelerator="cpu", devices=2, strategy="ddp", **fabrics)
        fabric.launch()
        module = network()
        compiled = torch.compile(module, backend="eager") if kind == "compiled" else module
        model, optimizer = fabric.setup(compiled, optimizer_of(module))
        scaler = getattr(fabric.strategy.precision, "scaler", None)
        adacons_hvd.ddp.attach(model, optimizer, AdaCons(), grad_scaler=scaler)
        train_with_fabric(fabric, model, optimizer, rows_by_turns(), accumulate=2, clip=0.5)
        assert optimizer.report.steps == 6
        assert_same(module, rows_by_turns(), accumulate=2, clip=0.5, **by_hand)

    cluster.run(case)


def test_fabric_saves_and_resumes(cluster, tmp_path):
    def case():
        from lightning.fabric import Fabric
        from trainer_job import assert_same, bits_of_all_ranks, network, optimizer_of, rows_by_turns

        import adacons_hvd.ddp
        from adacons_hvd import AdaCons

        fabric = Fabric(accelerator="cpu", devices=2, strategy="ddp_find_unused_parameters_true")
        fabric.launch()

        def make():
            module = network()
            model, optimizer = fabric.setup(module, optimizer_of(module))
            adacons_hvd.ddp.attach(model, optimizer, AdaCons())
            return module, model, optimizer

        module, model, optimizer = make()
        train_with_fabric(fabric, model, optimizer, rows_by_turns()[:6])
        fabric.save(tmp_path / "saved.ckpt", {"model": model, "optimizer": optimizer})
        train_with_fabric(fabric, model, optimizer, rows_by_turns()[6:])
        assert_same(module, rows_by_turns(), find_unused_parameters=True)

        resumed, model, optimizer = make()
        fabric.load(tmp_path / "saved.ckpt", {"model": model, "optimizer": optimizer})
        train_with_fabric(fabric, model, optimizer, rows_by_turns()[6:])
        assert bits_of_all_ranks(resumed) == bits_of_all_ranks(module)

    cluster.run(case)
