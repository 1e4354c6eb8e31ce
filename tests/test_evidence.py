"""The studies of ``benchmarks/evidence``: their controls are what they claim to be, and their smallest runs work."""

from __future__ import annotations

import math

import pytest
import torch

from adacons_hvd import AdaCons
from benchmarks.evidence import __main__, contenders, linear, page, report, search, spread, studies, training
from benchmarks.evidence.contenders import ADACONS, AVERAGE, CONTENDERS, CURVATURE, EqualLengths
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
    torch.testing.assert_close(EqualLengths()(rows), unit(rows).mean(0))
    # AdaCons is EqualLengths wherever all workers agree equally with the mean.
    symmetric = torch.eye(6, dtype=torch.float64) + 0.3
    torch.testing.assert_close(AdaCons()(symmetric), EqualLengths()(symmetric))


def test_others_only_leaves_out_the_own_gradient(rows):
    lengths = rows.norm(dim=1)
    others = (rows.sum(0) - rows) / len(rows)
    alpha = (rows * others).sum(1) / lengths
    expected = (alpha / alpha.sum() / lengths) @ rows
    torch.testing.assert_close(contenders.OthersOnly(momentum=0)(rows), expected)


@pytest.mark.parametrize("name", CONTENDERS)
def test_a_length_is_what_the_search_is_told(rows, name):
    contender = CONTENDERS[name]
    # Their own direction is all that curvature knows of them, so it does not turn the step.
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


@pytest.mark.parametrize("name", ["images", "language"])
def test_larger_models_have_the_parameters_that_their_names_say(name):
    for size, many in {"100k": 1e5, "1M": 1e6, "10M": 1e7}.items():
        shapes = task(f"{name} {size}").shapes.values()
        assert sum(map(math.prod, shapes)) == pytest.approx(many, rel=0.1)


def test_gradients_are_the_same_one_by_one_and_together(monkeypatch):
    work = task("images")
    vector = work.start(torch.Generator().manual_seed(0))
    x, y = work.train[0][:24].view(3, 8, -1), work.train[1][:24].view(3, 8)
    together = training.gradients_of(work, vector)(work.named(vector), x, y)
    monkeypatch.setattr(training, "LARGE", 1)
    one_by_one = training.gradients_of(work, vector)(work.named(vector), x, y)
    torch.testing.assert_close(one_by_one, together)


@pytest.mark.parametrize(
    ("plain", "other"),
    [
        ({}, {"schedule": "cosine"}),
        ({}, {"schedule": "constant"}),
        ({"optimizer": "Adam"}, {"optimizer": "Adam", "beta2": 0.9}),
        ({"optimizer": "AdamW"}, {"optimizer": "AdamW", "decay": 1.0}),
        ({"optimizer": "AdamW"}, {"optimizer": "Muon"}),
        ({"clip": "after", "threshold": 0.1}, {"clip": "after", "threshold": 0.2}),
    ],
)
def test_what_is_tuned_changes_the_run(plain, other):
    base = {"task": "images", "contender": AVERAGE, "workers": 2, "batch": 8, "steps": 12}
    first, second = (training.train(Setting(**base, **more), 2.0**-5, 0, True) for more in (plain, other))
    assert first is not None
    assert second is not None
    assert first != second


def test_muon_has_the_hidden_matrices_and_both_decay():
    work = task("images")
    vector = work.start(torch.Generator().manual_seed(0))
    setting = Setting("images", AVERAGE, "Muon", decay=0.5)
    groups = [one.param_groups[0] for one in training.optimizers_of(setting, work, vector, work.named(vector))]
    assert [[piece.ndim for piece in group["params"]] for group in groups] == [[2, 2], [1, 1, 2, 1]]
    assert [group["weight_decay"] for group in groups] == [0.5, 0.5]


def test_schedules_end_where_they_say():
    for name, end in {"linear": 0, "cosine": 0, "constant": 1}.items():
        factors = [training.SCHEDULES[name](step / 10) for step in range(11)]
        assert factors == sorted(factors, reverse=True)
        assert (factors[0], factors[-1]) == (1, pytest.approx(end, abs=1e-9))


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
    result = search.measure(record, [setting])
    assert result.rate == 4
    assert {4 / 2, 4 * 2} <= {rate for rate, _ in asked}
    assert not {seed for rate, seed in asked if rate != 4} & set(search.REPORTED)
    asked.clear()
    assert search.measure(search.Record(tmp_path / "runs.json"), [setting]) == result
    assert asked == []


def test_a_method_takes_the_best_of_its_settings_on_validation_data(tmp_path, monkeypatch):
    def train(setting: Setting, rate: float, seed: int, final: bool) -> float | None:
        # The largest threshold is best where results are measured, which must not count.
        return (setting.threshold if final else -abs(setting.threshold - 2)) - abs(math.log2(rate))

    monkeypatch.setattr(search, "train", train)
    settings = [Setting("recommender", AVERAGE, clip="after", threshold=threshold) for threshold in (1.0, 2.0, 4.0)]
    result = search.measure(search.Record(tmp_path / "runs.json"), settings)
    assert result.setting.threshold == 2
    assert result.scores == [2.0] * len(search.REPORTED)


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


@pytest.fixture
def quick_rates(monkeypatch):
    """Training is replaced by a sum, so that what is asked for is what counts."""
    asked = []

    def train(setting: Setting, rate: float, seed: int, final: bool) -> float | None:
        asked.append((setting.contender, seed))
        return 50.0 + len(setting.contender) - abs(math.log2(rate) + 3) + seed / 100

    monkeypatch.setattr(search, "train", train)
    return asked


def test_a_study_ends_with_its_budget_and_tells_what_it_has(tmp_path, quick_rates, monkeypatch):
    [grid] = [grid for grid in studies.grids() if grid.title == "workers, Adam"]
    clock = iter(range(0, 10**6, 10))
    monkeypatch.setattr(__main__.time, "process_time", lambda: next(clock))
    record = search.Record(tmp_path / "runs.json")
    __main__.run(grid, record, search.CHOOSING, grid.seeds)
    asked = len(quick_rates)
    assert 0 < asked < len(grid.cells) * 11
    found = page.study(grid, search.Finished([record.path]), search.CHOOSING, grid.seeds)
    assert len(quick_rates) == asked
    done = {cell["column"]: len(cell["scores"]) for cell in found["cells"]}
    assert "4" in done
    assert "128" not in done
    assert all(report.lead(found, CURVATURE, AVERAGE, column) for column in done)


def test_the_page_is_made_of_records_of_several_processes(tmp_path, quick_rates, capsys):
    for name, count in (("one", "4"), ("two", "8")):
        [grid] = [grid for grid in studies.grids() if grid.title == "workers, SGD"]
        part = {key: cell for key, cell in grid.cells.items() if key[1] == count}
        record = search.Record(tmp_path / f"{name}.json")
        __main__.run(studies.replace(grid, cells=part), record, search.CHOOSING, grid.seeds)
    asked = len(quick_rates)
    places = ["--results", tmp_path / "data.txt", "--page", tmp_path / "page.md"]
    assert __main__.main(["--report", "--only", "workers, SGD", "--out", str(tmp_path), *map(str, places)]) == 0
    assert len(quick_rates) == asked
    written = (tmp_path / "page.md").read_text()
    assert f"| {CURVATURE} − {AVERAGE} | **+2.00 ± 0.00** | **+2.00 ± 0.00** |" in written
    assert "(Not run yet: `trouble, SGD`.)" in written
    # Without any records, the page is made of the data alone.
    empty = tmp_path / "empty"
    empty.mkdir()
    assert __main__.main(["--report", "--out", str(empty), *map(str, places)]) == 0
    assert (tmp_path / "page.md").read_text() == written


def test_runs_side_by_side_are_the_same_as_one_after_the_other(tmp_path):
    only = ["--quick", "--only", "workers, SGD@4", "--out", str(tmp_path)]
    assert __main__.main([*only, "--processes", "2"]) == 0
    together = search.Record(tmp_path / "runs.json")
    [grid] = [grid.of("4") for grid in studies.grids(True) if grid.title == "workers, SGD"]
    one_by_one = search.Record(tmp_path / "again.json")
    for settings in grid.cells.values():
        search.measure(one_by_one, settings, reported=grid.seeds)
    assert len(grid.cells) == 4
    assert together.runs == one_by_one.runs


def test_none_is_begun_after_its_time(tmp_path):
    only = ["--quick", "--only", "workers, SGD", "--out", str(tmp_path), "--processes", "2", "--minutes", "0"]
    assert __main__.main(only) == 0
    assert not list(tmp_path.iterdir())


def test_the_page_is_that_of_the_data():
    written = (__main__.DOCS / "evidence.md").read_text(encoding="utf-8")
    assert page.text_of(page.merged({}, page.RESULTS)) == written, "run python -m benchmarks.evidence --report"


def test_every_study_s_settings_are_distinct_runs():
    """A setting's text is what its runs are remembered by."""
    for quick in (False, True):
        cells = [setting for grid in studies.grids(quick) for cell in grid.cells.values() for setting in cell]
        assert len({str(cell) for cell in cells}) == len(set(cells))


def test_the_smallest_grid_from_the_command_line(tmp_path, capsys):
    assert __main__.main(["--quick", "--only", "ablation, recommender, 32 x 64", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    for name in studies.ABLATION:
        assert f"| {name} |" in printed
    assert f"| {ADACONS} − {AVERAGE} |" in printed
    assert (tmp_path / "quick.json").exists()
