"""The page of measurements is made of the data, and a run of the benchmarks adds data of the same kind."""

from dataclasses import asdict

import pytest
from blocks import ROOT

from benchmarks import page, record
from benchmarks.jobs import Cluster, run

STUDIES = record.read(record.RESULTS)


def test_the_page_and_its_charts_are_made_of_the_data():
    for name, text in page.pages(STUDIES).items():
        assert (ROOT / "docs" / name).read_text(encoding="utf-8") == text, f"{name} is of other data: run `make page`"


def test_every_study_has_a_file_as_it_would_be_written(tmp_path):
    assert STUDIES.keys() == record.STUDIES.keys()
    for study, runs in STUDIES.items():
        record.write(tmp_path, study, runs)
        assert (tmp_path / f"{study}.json").read_text() == (record.RESULTS / f"{study}.json").read_text()


@pytest.fixture(scope="module")
def measured():
    """The results of small jobs: collectives and training steps of two ranks, and the arithmetic of one process."""
    everything = ["paper", *record.EXACT, *record.APPROXIMATE, "auto", "fast"]
    sums = {"lengths": [10_000], "contenders": everything, "turns": 5, "seconds": 1}
    steps = {"framework": "torch", "model": "cnn", "contenders": ["average", "auto"], "turns": 5, "seconds": 1}
    jobs = [
        ("collectives", Cluster(1, 2), sums),
        ("steps", Cluster(1, 2), steps),
        ("weights", Cluster(1, 1), {"device": "cpu", "length": 1 << 20}),
    ]
    return [
        {"kind": kind, "cluster": asdict(cluster), "case": case, "result": run(kind, cluster, case, timeout=120)}
        for kind, cluster, case in jobs
    ]


def test_a_run_takes_the_place_of_earlier_figures_of_the_same_cases(tmp_path, measured):
    for study, runs in STUDIES.items():
        record.write(tmp_path, study, runs)
    record.add(tmp_path, measured)
    studies = record.read(tmp_path)

    more = {study: len(record.every(studies, study)) - len(record.every(STUDIES, study)) for study in STUDIES}
    # The phases are those of the schedules that `auto` and `fast` took, which may be others now.
    del more["phases"]
    # Arithmetic on 4 MiB is a new case.
    assert more == dict.fromkeys(STUDIES.keys() - {"phases"}, 0) | {"local": 4}
    for study in studies.keys() - {"memory", "aggregators"}:
        known = set().union(*(row.keys() for row in record.every(STUDIES, study)))
        assert all(row.keys() <= known for row in studies[study][0]["rows"]), study
    assert page.pages(studies).keys() == page.pages(STUDIES).keys()


def test_a_ratio_is_the_median_of_the_turns(tmp_path, measured):
    record.add(tmp_path, measured)
    (row,) = record.every(record.read(tmp_path), "steps")
    times = measured[1]["result"]["times"]
    turns = sorted(own / peer for own, peer in zip(times["auto"], times["average"], strict=True))
    assert row["ratios"]["auto"][0] == pytest.approx(turns[len(turns) // 2], rel=1e-3)


def test_memory_is_compared_with_averaging_of_the_same_model_on_the_same_cluster():
    def alone(model, contender, ranks, peak):
        case = {"framework": "torch", "model": model, "contenders": [contender]}
        result = {"times": {contender: [1.0]}, "peak": peak * 2**20, "parameters": 2**18, "comparison": 0.0}
        return {"kind": "steps", "cluster": asdict(Cluster(1, ranks)), "case": case, "result": result}

    measured = [
        alone("cnn", "average", 2, 100),
        alone("cnn", "one-pass", 2, 102),
        alone("resnet-50", "average", 2, 500),
        alone("resnet-50", "one-pass", 4, 900),
    ]
    beyond = [row.get("beyond") for study, row in record.rows(measured) if study == "memory"]
    assert beyond == [None, 2.0, None, None]
