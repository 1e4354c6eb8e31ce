"""Transformers' Trainer with AggregationMixin."""

from __future__ import annotations

import pytest

pytestmark = [pytest.mark.ranks(2, launcher="torchrun", pool="trainers"), pytest.mark.time_limit(180)]


@pytest.mark.parametrize("kind", ["plain", "bf16", "compiled"])
def test_accumulating_and_clipping(cluster, kind, tmp_path):
    def case():
        import torch
        from trainer_job import assert_same, batches_by_turns
        from transformers_job import trainer

        options = {"bf16": {"bf16": True}, "compiled": {"torch_compile": True, "torch_compile_backend": "eager"}}
        by_hand = {"dtype": torch.bfloat16} if kind == "bf16" else {}
        fit = trainer(tmp_path, gradient_accumulation_steps=2, max_grad_norm=0.5, **options.get(kind, {}))
        fit.train()
        assert fit.optimizer.report.steps == 6
        assert_same(fit.model.net, batches_by_turns(), accumulate=2, clip=0.5, find_unused_parameters=True, **by_hand)

    cluster.run(case)


def test_resuming_is_bit_for_bit(cluster, tmp_path):
    def case():
        from trainer_job import assert_same, batches_by_turns, bits_of_all_ranks, epochs
        from transformers_job import trainer

        settings = {"num_train_epochs": 2, "eval_strategy": "steps", "eval_steps": 5, "logging_steps": 4}
        first = trainer(tmp_path, save_strategy="steps", save_steps=7, **settings)
        first.train()
        assert sum("eval_loss" in entry for entry in first.state.log_history) >= 4
        assert_same(first.model.net, list(epochs(batches_by_turns(), 2)), find_unused_parameters=True)

        again = trainer(tmp_path, **settings)
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-7"))
        assert again.optimizer.report.steps == 24
        assert bits_of_all_ranks(again.model.net) == bits_of_all_ranks(first.model.net)

    cluster.run(case)


def test_training_goes_on_in_a_second_call(cluster, tmp_path):
    def case():
        from trainer_job import assert_same, batches_by_turns, epochs
        from transformers_job import trainer

        fit = trainer(tmp_path)
        fit.train()
        fit.evaluate()
        fit.train()
        assert fit.optimizer.report.steps == 24
        assert_same(fit.model.net, list(epochs(batches_by_turns(), 2)), find_unused_parameters=True)

    cluster.run(case)


def test_the_report_is_logged_with_the_loss(cluster, tmp_path):
    def case():
        from transformers_job import trainer

        fit = trainer(tmp_path, logging_steps=3, eval_strategy="epoch")
        fit.train()
        ours = [entry for entry in fit.state.log_history if "adacons/spread" in entry]
        assert [entry["step"] for entry in ours] == [3, 6, 9, 12]
        assert all("loss" in entry for entry in ours)
        assert ours[-1]["adacons/spread"] == fit.optimizer.report.spread[0]

    cluster.run(case)


def test_what_cannot_be_is_refused_at_once(cluster, tmp_path):
    def case():
        import pytest
        from transformers_job import trainer

        from adacons_hvd.transformers import AggregationMixin, AggregationTrainer

        with pytest.raises(ValueError, match="auto_find_batch_size wraps the model anew"):
            trainer(tmp_path, auto_find_batch_size=True)
        with pytest.raises(TypeError, match="AggregationMixin has to stand before a Trainer"):
            AggregationMixin(aggregator=None)
        with pytest.raises(TypeError, match="missing 1 required keyword-only argument: 'aggregator'"):
            AggregationTrainer(None)
        with pytest.raises(ValueError, match="granularity must be"):
            trainer(tmp_path, aggregation={"granularity": "tensor"}).train()

    cluster.run(case)


def test_a_process_alone_is_refused_at_once(tmp_path):
    from transformers_job import trainer

    with pytest.raises(TypeError, match="needs a model in DistributedDataParallel, and this one is in Model:"):
        trainer(tmp_path).train()
