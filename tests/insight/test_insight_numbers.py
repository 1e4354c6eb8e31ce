"""The numbers of a report, against an oracle that sees the gradients: with groups, and absent or silent workers."""

from __future__ import annotations

import copy
import math

import insight_oracle
import numpy as np
import pytest
import torch

from adacons_hvd import AdaCons, Curvature, Mean, Statistics
from adacons_hvd.costs import Choice
from adacons_hvd.insight import MovingAverages, SickWorkers
from adacons_hvd.ops import as_plain
from adacons_hvd.report import Report

CHOICE = Choice("gather", "a test")


def rows_of(workers: int, seed: int = 0, length: int = 40) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(workers, length, generator=generator, dtype=torch.float64) + 0.4


def grouped(rows: torch.Tensor, cuts: list[int], gramian: bool = False, present: torch.Tensor | None = None):
    """The statistics of groups of columns."""
    parts = [Statistics.of(part, gramian, present) for part in rows.tensor_split(cuts, 1)]
    table = torch.stack([part.gramian for part in parts]) if gramian else None
    stacked = (torch.stack([getattr(part, name) for part in parts]) for name in ("dots", "squares", "present"))
    return Statistics(*stacked, table)


def report_on(aggregator, statistics, memory=None) -> Report:
    decision = aggregator.decide(statistics, memory or {})
    return Report(decision, statistics, CHOICE)


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("workers", [2, 3, 8])
def test_numbers_of_one_step_by_group(workers, plain):
    rows = rows_of(workers)
    statistics = grouped(rows, [7, 30])
    if plain:
        statistics = Statistics(*(as_plain(x) for x in (statistics.dots, statistics.squares, statistics.present)))
    report = report_on(Mean(), statistics)
    for group, part in enumerate(rows.tensor_split([7, 30], 1)):
        noise, signal = insight_oracle.noise_and_signal(part.numpy())
        expected = noise / signal if signal > 0 else math.inf
        assert report.noise_scale[group] == pytest.approx(expected, rel=1e-9)
        assert report.adascale_gain[group] == pytest.approx(insight_oracle.gain(noise, signal, workers), rel=1e-9)
        assert report.agreement[group] == pytest.approx(insight_oracle.agreement(part.numpy()), abs=1e-12)
        assert report.norms[group] == pytest.approx(np.linalg.norm(part.numpy(), axis=1))


def test_the_absent_and_the_silent():
    rows = rows_of(5)
    rows[1] = 0
    rows[3] = 0
    present = torch.tensor([True, True, True, False, True])
    report = report_on(Mean(), Statistics.of(rows, present=present))
    here = rows[[0, 1, 2, 4]].numpy()
    noise, signal = insight_oracle.noise_and_signal(here)
    assert report.noise_scale == [pytest.approx(noise / signal)]
    assert report.adascale_gain == [pytest.approx(insight_oracle.gain(noise, signal, 4))]
    assert report.agreement == [pytest.approx(insight_oracle.agreement(rows.numpy(), [0, 1, 2, 4]), abs=1e-12)]
    assert report.agreement[0][1] == report.agreement[0][3] == 0
    nothing = report_on(Mean(), Statistics.of(torch.zeros(3, 4)))
    assert nothing.agreement == [[0, 0, 0]]
    assert math.isnan(nothing.noise_scale[0])
    assert math.isnan(nothing.adascale_gain[0])
    alone = report_on(Mean(), Statistics.of(rows_of(1)))
    assert math.isnan(alone.noise_scale[0])
    assert alone.agreement == [[0]]


@pytest.mark.parametrize("make", [MovingAverages, SickWorkers])
@pytest.mark.parametrize("inside", [Mean(), AdaCons(), Curvature(memory=2)])
def test_moving_averages_skip_broken_steps_and_outlast_a_change_of_workers(make, inside):
    aggregator, oracle = make(inside, averaging=0.9), insight_oracle.Averages(0.9)
    for seed in range(20):
        rows = rows_of(4 if seed < 10 else 6, seed)
        if seed in (5, 15):
            rows[0, 0] = math.nan
        else:
            oracle.add(rows.numpy())
        aggregator(rows)
    memory = aggregator.state_dict()
    assert memory["noise"].item() == pytest.approx(oracle.noise, rel=1e-9)
    assert memory["signal"].item() == pytest.approx(oracle.signal, rel=1e-9)
    resumed = make(inside, averaging=0.9)
    resumed.load_state_dict(memory)
    oracle.add(rows_of(6, 20).numpy())
    decision, _ = resumed.explain(rows_of(6, 20))
    report = Report(decision, Statistics.of(rows_of(6, 20)), CHOICE)
    assert report.noise_scale == [pytest.approx(oracle.noise_scale, rel=1e-9)]
    assert report.adascale_gain == [pytest.approx(insight_oracle.gain(oracle.noise, oracle.signal, 6), rel=1e-9)]


@pytest.mark.parametrize("make", [MovingAverages, SickWorkers])
@pytest.mark.parametrize("inside", [Mean(), AdaCons(), Curvature(memory=2)])
def test_a_wrapper_changes_no_result_and_takes_up_what_the_aggregator_alone_has_left(make, inside):
    bare, wrapped = type(inside)(**inside_settings(inside)), make(inside)
    for seed in range(6):
        if seed == 3:
            wrapped = make(inside)
            wrapped.load_state_dict(copy.deepcopy(bare.state_dict()))
        rows = rows_of(4 if seed < 5 else 5, seed)
        assert torch.equal(bare(rows), wrapped(rows))


def inside_settings(aggregator):
    return {name: value for name, value in vars(aggregator).items() if name[0] != "_"}


def test_arguments_are_checked():
    for arguments, error in [
        ({"aggregator": AdaCons}, TypeError),
        ({"aggregator": SickWorkers(Mean())}, TypeError),
        ({"averaging": 1.0}, ValueError),
        ({"threshold": 5}, ValueError),
        ({"steps": 0}, ValueError),
        ({"policy": "kill"}, ValueError),
        ({"callback": "print"}, TypeError),
    ]:
        with pytest.raises(error, match=next(iter(arguments))):
            SickWorkers(**{"aggregator": Mean(), **arguments})
    assert SickWorkers(Mean()) == SickWorkers(Mean())
    assert SickWorkers(Mean(), callback=print) != SickWorkers(Mean())
