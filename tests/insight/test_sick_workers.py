"""Who is named, when and how often; who is left out, and comes back."""

from __future__ import annotations

import math
import warnings

import insight_oracle
import pytest
import torch

from adacons_hvd import AdaCons, Curvature, Mean, NormalizedMean, Statistics
from adacons_hvd.costs import Choice
from adacons_hvd.insight import SickWorkers
from adacons_hvd.ops import as_plain
from adacons_hvd.report import Report


def rows_of(workers: int, seed: int, length: int = 60) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(workers, length, generator=generator, dtype=torch.float64) + 0.6


def sick(rows: torch.Tensor, rank: int, how: str) -> torch.Tensor:
    rows = rows.clone()
    rows[rank] = {"turned": -rows[rank], "long": 30 * rows[rank], "silent": 0 * rows[rank]}[how]
    return rows


@pytest.mark.parametrize("policy", ["warn", "exclude"])
@pytest.mark.parametrize("how", ["turned", "long", "silent"])
@pytest.mark.parametrize("workers", [3, 4, 8])
def test_a_sick_worker_is_named_once_and_so_is_its_recovery(workers, how, policy):
    news = []
    aggregator = SickWorkers(AdaCons(), policy, news.append)
    for step in range(160):
        rows = rows_of(workers, step)
        aggregator(sick(rows, 1, how) if 40 <= step < 90 else rows)
    assert [(worker.rank, worker.recovered) for worker in news] == [(1, False), (1, True)]
    began, ended = news
    assert 41 <= began.since <= began.step < 60
    assert 91 <= ended.step < 130
    assert ended.since == began.since
    assert began.excluded == (policy == "exclude")
    assert not ended.excluded
    rows = sick(rows_of(workers, began.step - 1), 1, how).numpy()
    assert began.agreement == pytest.approx(insight_oracle.agreement(rows)[1], abs=1e-9)
    if how == "long":
        assert began.relative_length == pytest.approx(30, rel=0.3)


def test_a_worker_that_is_left_out_is_as_good_as_absent():
    """From the step in which it is named, each aggregator's result is that of the others alone."""
    for inside in (Mean(), NormalizedMean(), AdaCons(momentum=0), Curvature(memory=0)):
        aggregator = SickWorkers(inside, "exclude", lambda worker: None)
        for step in range(60):
            rows = sick(rows_of(4, step), 2, "long")
            result = aggregator(rows)
        alone = type(inside)(**{k: v for k, v in vars(inside).items() if k[0] != "_"})
        assert torch.allclose(result, alone(rows[[0, 1, 3]]), rtol=1e-10)
        decision, _ = aggregator.explain(rows)
        report = Report(decision, Statistics.of(rows), Choice("gather", "a test"))
        assert (report.sick, report.weights[0][2]) == ([2], 0)
        assert report.agreement[0] == pytest.approx(insight_oracle.agreement(rows.numpy(), [0, 1, 3]), abs=1e-9)


def test_a_history_keeps_the_mean_of_those_that_counted():
    aggregator = SickWorkers(Curvature(memory=2), "exclude", lambda worker: None)
    for step in range(60):
        rows = sick(rows_of(4, step), 2, "long")
        aggregator(rows)
    kept = aggregator.state_dict()["means"][:2]
    expected = rows[[0, 1, 3]].mean(0)
    assert any(torch.allclose(row, expected) for row in kept)


def test_no_majority_is_left_out():
    aggregator = SickWorkers(Mean(), "exclude", lambda worker: None, threshold=1.0)
    for step in range(80):
        rows = rows_of(4, step)
        rows[2] *= 20
        rows[3] *= -20
        decision, _ = aggregator.explain(rows)
    assert decision.present.sum() > 2


def test_two_workers_cannot_be_told_apart_and_broken_steps_say_nothing():
    news = []
    aggregator = SickWorkers(Mean(), callback=news.append)
    for step in range(60):
        aggregator(sick(rows_of(2, step), 1, "turned"))
    assert news == []
    aggregator = SickWorkers(Mean(), callback=news.append)
    for step in range(60):
        rows = rows_of(4, step)
        rows[1, 0] = math.inf
        aggregator(rows)
    assert news == []
    assert aggregator.state_dict()["judged"].item() == 0


def test_plain_numbers_and_groups_give_what_tensors_and_the_whole_give():
    whole, plain, layered = (SickWorkers(AdaCons(), callback=lambda worker: None) for _ in range(3))
    memories = [{}, {}, {}]
    for step in range(60):
        rows = rows_of(5, step)
        rows = sick(rows, 4, "turned") if step > 20 else rows
        s = Statistics.of(rows)
        parts = [Statistics.of(part) for part in rows.tensor_split([11, 30], 1)]
        groups = Statistics(*(torch.stack([getattr(p, n) for p in parts]) for n in ("dots", "squares", "present")))
        few = Statistics(*(as_plain(x[None]) for x in (s.dots, s.squares, s.present)))
        decisions = [
            a.decide(x, m) for a, x, m in zip((whole, plain, layered), (s, few, groups), memories, strict=True)
        ]
        memories = [decision.memory for decision in decisions]
        news = [decision.news for decision in decisions]
        assert news[1].rows[0] == pytest.approx(news[0].tolist(), abs=1e-9)
        assert news[2].tolist() == pytest.approx(news[0].tolist(), abs=1e-9)
    assert memories[0]["sick"].tolist() == [0, 0, 0, 0, 1]
    assert memories[2]["sick"].tolist() == [[0, 0, 0, 0, 1]] * 3


def test_an_absent_worker_keeps_its_record():
    aggregator = SickWorkers(Mean(), callback=lambda worker: None)
    memory = {}
    for step in range(60):
        rows = sick(rows_of(4, step), 1, "turned")
        present = torch.tensor([True, step < 40, True, True])
        rows[1] *= step < 40
        memory = aggregator.decide(Statistics.of(rows, present=present), memory).memory
    assert memory["sick"].tolist() == [0, 1, 0, 0]


def test_policies_speak():
    def train(**settings):
        aggregator = SickWorkers(Mean(), **settings)
        for step in range(40):
            aggregator(sick(rows_of(4, step), 3, "turned"))

    with pytest.warns(UserWarning, match="rank 3 looks sick since step") as caught:
        train()
    assert len(caught) == 1
    with pytest.raises(RuntimeError, match="rank 3 looks sick since step"):
        train(policy="raise")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(callback=lambda worker: None)


def test_a_gradient_that_is_not_finite_counts_though_its_worker_is_excluded():
    # No weight keeps it out of the result, so the step is the average, as it is for any other aggregator.
    generator = torch.Generator().manual_seed(0)
    aggregator = SickWorkers(AdaCons(), policy="exclude", steps=2)
    truth = torch.randn(200, generator=generator)
    for _ in range(60):
        rows = truth + 0.5 * torch.randn(6, 200, generator=generator)
        rows[2] = -rows[2]
        decision, _ = aggregator.explain(rows)
    assert decision.weights[2] == 0
    rows[2, 0] = float("nan")
    decision, _ = aggregator.explain(rows)
    assert decision.fallback.item()
