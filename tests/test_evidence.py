"""The studies of ``benchmarks/evidence``: their controls are what they claim to be, and their smallest runs work."""

from __future__ import annotations

import math

import pytest
import torch

from adacons_hvd import AdaCons
from benchmarks.evidence import __main__, contenders, linear, report, search, spread, studies, training
from benchmarks.evidence.contenders import ADACONS, AVERAGE, CONTENDERS, EqualLengths, NormalizedMean, SubspaceNewton
from benchmarks.evidence.tasks import task
from benchmarks.evidence.training import Setting


@pytest.fixture
def rows():
    generator = torch.Generator().manual_seed(0)
    common = torch.randn(40, generator=generator, dtype=torch.float64)
    return common + torch.randn(6, 40, generator=generator, dtype=torch.float64)


def unit(x: torch.Tensor) -> torch.Tensor:
    return x / x.norm(dim=-1, keepdim=True)


def test_controls_are_what_their_names_say(rows):
    torch.testing.assert_close(NormalizedMean()(rows), unit(rows.mean(0)))
    torch.testing.assert_close(EqualLengths()(rows), unit(rows).mean(0))
    # AdaCons is EqualLengths wherever all workers agree equally with the mean.
    symmetric = torch.eye(6, dtype=torch.float64) + 0.3
    torch.testing.assert_close(AdaCons()(symmetric), EqualLengths()(symmetric))


def test_the_second_order_variant_is_a_damped_natural_gradient(rows):
    """Held against the d x d matrix that the Gramian stands for."""
    count, length = rows.shape
    damping = 0.7 * rows.square().sum(1).mean() / count
    fisher = rows.T @ rows / count
    expected = unit(torch.linalg.solve(fisher + damping * torch.eye(length, dtype=torch.float64), rows.mean(0)))
    torch.testing.assert_close(SubspaceNewton(0.7)(rows), expected)
    torch.testing.assert_close(SubspaceNewton(1e9)(rows), unit(rows.mean(0)))
    shortest = SubspaceNewton(1e-9)(rows)
    inner = rows @ shortest
    torch.testing.assert_close(inner, inner.mean().expand(count))


def test_others_only_leaves_out_the_own_gradient(rows):
    lengths = rows.norm(dim=1)
    others = (rows.sum(0) - rows) / len(rows)
    alpha = (rows * others).sum(1) / lengths
    expected = (alpha / alpha.sum() / lengths) @ rows
    torch.testing.assert_close(contenders.OthersOnly(momentum=0)(rows), expected)


@pytest.mark.parametrize("name", CONTENDERS)
def test_a_length_is_what_the_search_is_told(rows, name):
    contender = CONTENDERS[name]
    same = rows[:1].expand(8, -1)
    expected = {"average": same[0], "unit": unit(same[0]), "sum": 8 * same[0]}[contender.length]
    torch.testing.assert_close(contender.make()(same), expected)


@pytest.mark.parametrize("name", ["images", "language", "recommender"])
def test_tasks_learn(name):
    work = task(name)
    setting = Setting(name, AVERAGE, "Adam", workers=4, batch=8, steps=25)
    before = work.score(
        work.model(work.named(work.start(torch.Generator().manual_seed(0))), work.test[0]), work.test[1]
    )
    after = training.train(setting, 2.0**-6, seed=0, final=True)
    assert after is not None
    assert work.best(before, after) == after != before
    assert after == training.train(setting, 2.0**-6, seed=0, final=True)


def test_a_rate_that_is_too_high_is_no_result():
    assert training.train(Setting("images", AVERAGE, workers=2, batch=4, steps=60), 1e4, seed=0, final=False) is None


def test_troubles_do_what_they_say():
    work = task("images")
    labels = work.train[1]

    def setting(trouble: str) -> Setting:
        return Setting("images", AVERAGE, workers=8, batch=500, trouble=trouble)

    shards = training.shares(setting("skewed"), work, torch.Generator().manual_seed(0))
    assert max(len(labels[shard].unique()) for shard in shards) <= 4
    everything = training.shares(setting("noisy"), work, torch.Generator().manual_seed(0))
    _, right = training.draw(setting(""), work, everything, torch.Generator().manual_seed(0))
    for trouble, first, second in (("noisy", 0.36, 0.36), ("half noisy", 0.0, 0.72)):
        _, found = training.draw(setting(trouble), work, everything, torch.Generator().manual_seed(0))
        wrong = (found != right).double().mean(1)
        assert float(wrong[::2].mean()) == pytest.approx(first, abs=0.05)
        assert float(wrong[1::2].mean()) == pytest.approx(second, abs=0.05)
    matrix = torch.ones(8, 100)
    training.spoil(setting("corrupted"), matrix, torch.Generator().manual_seed(0))
    assert float(matrix[-1].norm()) == pytest.approx(100)
    assert bool((matrix[:-1] == 1).all())


def test_the_best_rate_is_inside_the_grid_and_found_once(tmp_path, monkeypatch):
    asked = []

    def train(setting: Setting, rate: float, seed: int, final: bool) -> float | None:
        asked.append((rate, seed))
        return None if rate > 8 else -abs(math.log2(rate) - 2.2)

    monkeypatch.setattr(search, "train", train)
    setting = Setting("recommender", AVERAGE)
    record = search.Record(tmp_path / "runs.json")
    result = search.measure(record, setting)
    assert result.rate == 4
    assert {4 / 2, 4 * 2} <= {rate for rate, _ in asked}
    assert not {seed for rate, seed in asked if rate != 4} & set(search.REPORTED)
    asked.clear()
    assert search.measure(search.Record(tmp_path / "runs.json"), setting) == result
    assert asked == []


def test_intervals_are_student_s():
    mean, half = report.interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert (mean, half) == (3, pytest.approx(1.963, abs=1e-3))


def test_the_regression_converges_with_unequal_weights_only():
    losses = linear.run(128, seed=1, updates=300)
    assert losses[f"{ADACONS}, 8 workers"][-1] < 1e-2 < losses[linear.AVERAGE][-1]
    control = linear.run(128, 1, linear.controls, updates=300)["equal lengths, 8 workers"]
    assert control[-1] < losses[linear.AVERAGE][-1]
    assert losses[linear.AVERAGE][0] == losses[f"{ADACONS}, 8 workers"][0] == control[0]


def test_a_larger_batch_makes_workers_agree():
    small, large = spread.look(4, 8, 20), spread.look(256, 8, 20)
    assert large["own share"] < small["own share"]
    assert 0 < large["angle"] < small["angle"] < 90


def test_every_study_s_settings_are_distinct_runs():
    """A setting's text is what its runs are remembered by."""
    for quick in (False, True):
        cells = [cell for grid in studies.grids(quick) for cell in grid.cells.values()]
        assert len({str(cell) for cell in cells}) == len(set(cells))


def test_the_smallest_grid_from_the_command_line(tmp_path, capsys):
    assert __main__.main(["--quick", "--only", "ablation, recommender, 32 x 64", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    for name in studies.ABLATION:
        assert f"| {name} |" in printed
    assert f"| {ADACONS} − {AVERAGE} |" in printed
    assert (tmp_path / "quick.json").exists()
