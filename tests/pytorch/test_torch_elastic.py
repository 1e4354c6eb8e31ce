"""Elastic jobs: workers come, leave and die, and nothing that was committed is lost."""

from __future__ import annotations

import pytest
from elastic_training import check, check_commits, run


def test_a_worker_comes_the_leader_is_killed_and_another_leaves(tmp_path):
    """Two workers, a third, SIGKILL for rank 0 between commits in the middle of a step, and a host less."""
    hosts = {"localhost": 1, "127.0.0.1": 1}
    sizes = [2, 3, 2, 1]
    changes = [{**hosts, "127.1": 1}, None, {"127.1": 1}]
    told = run(tmp_path, hosts, sizes, deaths=[[1, 5, 0, 3, "backward"]], changes=changes)
    check_commits(told)
    assert check(told, sizes) == 2  # those since the last commit
    (report,) = [fact["report"] for fact in told if "report" in fact]
    assert report["steps"] == max(fact["done"] for fact in told if "done" in fact)
    assert "1 worker" in report["reason"]


def test_without_an_aggregator(tmp_path):
    """From one worker to two, which Horovod's optimizer can do, and then back."""
    sizes = [1, 2, 1]
    told = run(tmp_path, {"localhost": 1}, sizes, aggregator=False, changes=[{"localhost": 2}, {"localhost": 1}])
    check_commits(told)
    assert check(told, sizes, aggregator=False) == 0


def test_a_newcomer_that_leads_before_its_first_commit_goes_on_from_the_last_one(tmp_path):
    """What it was given when it joined is all there is left of what was committed."""
    hosts = {"localhost": 1}
    sizes = [1, 1]
    told = run(tmp_path, hosts, sizes, deaths=[[1, 0, 0, 2, "backward"]], changes=[{"localhost": 1, "127.0.0.1": 1}])
    check_commits(told)
    assert check(told, sizes) == 0
    final = [fact for fact in told if "done" in fact and fact["stage"] == 1]
    assert {fact["host"] for fact in final} == {"127.0.0.1"}
    assert min(fact["done"] for fact in final) > 3


@pytest.mark.ranks(2, launcher="gloo")
class TestNumbering:
    def test_optimizers_are_numbered_afresh_when_horovod_is_initialised_anew(self, cluster):
        """One rank has used more optimizers than the other by then, as one that is older has."""

        def case():
            import harness
            import torch
            from torch_job import assert_equal_bits

            import adacons_hvd.torch as hvd
            from adacons_hvd import AdaCons
            from adacons_hvd.torch.numbering import take_number

            def optimizer_of(weight):
                return hvd.DistributedOptimizer(torch.optim.SGD([weight], lr=0.1), aggregator=AdaCons())

            hvd.init()
            kept = torch.nn.Parameter(torch.ones(3))
            optimizer = optimizer_of(kept)
            for again in range(2):
                other = torch.nn.Parameter(torch.ones(2))
                second = optimizer_of(other)
                for _ in range(2):
                    ((kept * (1 + harness.rank())).sum() + other.sum()).backward()
                    optimizer.step()
                    second.step()
                    optimizer.zero_grad()
                    second.zero_grad()
                if not again:
                    if harness.rank() == 0:
                        take_number(hvd.global_process_set)
                    hvd.shutdown()
                    hvd.init()
                    hvd.init()  # does nothing, also to numbers
            assert_equal_bits([kept, other])
            return optimizer._reducer.name, second._reducer.name, optimizer.report.steps

        assert cluster.run(case, fresh=True) == [("adacons.0", "adacons.1", 4)] * 2
