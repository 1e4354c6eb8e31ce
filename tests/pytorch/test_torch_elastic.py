"""Elastic jobs of PyTorch, beside what `tests/conformance` has of every binding."""

from __future__ import annotations

import pytest
from elastic_jobs import check, run

pytestmark = pytest.mark.ranks(2, launcher="gloo")


def test_without_an_aggregator(cluster, tmp_path):
    """From one worker to two, which Horovod's optimizer can do, and then back."""
    sizes = [1, 2, 1]
    changes = [{"localhost": 2}, {"localhost": 1}]
    told = run(cluster, "elastic_torch", tmp_path, {"localhost": 1}, sizes, aggregator=False, changes=changes)
    assert check(told, sizes, ["average"] * 3) == 0


def test_a_newcomer_that_leads_before_its_first_commit_goes_on_from_the_last_one(cluster, tmp_path):
    """The newcomer keeps what it was given when it joined, which is all that is left of the commit."""
    hosts, sizes = {"localhost": 1}, [1, 1]
    deaths, changes = [[1, 0, 0, 2, "backward"]], [{"localhost": 1, "127.0.0.1": 1}]
    told = run(cluster, "elastic_torch", tmp_path, hosts, sizes, deaths=deaths, changes=changes)
    assert check(told, sizes, ["momentum", "history", "no momentum"]) == 0
    final = [fact for fact in told if "done" in fact and fact["stage"] == 1]
    assert {fact["host"] for fact in final} == {"127.0.0.1"}
    assert min(fact["done"] for fact in final) > 3


BUSY = """
import os, signal, time
import torch
import adacons_hvd.torch as hvd
from harness.elastic import tell
from horovod.torch.mpi_ops import HorovodInternalError

hvd.init()
one = torch.ones(1)

@hvd.elastic.run
def train(state):
    if hvd.size() == 1:
        # The names are free again.
        found = [hvd.allreduce(one, op=hvd.Sum, name=f"tensor {k}").item() for k in range(20)]
        tell(end=found)
        return
    if hvd.rank() == 1:
        time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGKILL)
    handles = []
    try:
        while True:
            handles.append(hvd.allreduce_async(one, op=hvd.Sum, name=f"tensor {len(handles)}"))
    except HorovodInternalError:
        patience = time.monotonic() + 10
        while not all(map(hvd.poll, handles)) and time.monotonic() < patience:
            time.sleep(0.1)
        tell(sent=len(handles), left=sum(not hvd.poll(handle) for handle in handles))
        raise

train(hvd.elastic.TorchState(model=torch.nn.Linear(1, 1)))
"""


def test_what_is_sent_while_a_worker_dies_comes_to_an_end(cluster, tmp_path):
    """Horovod as released deadlocks here, or forgets what was sent last; see 0005-close-the-queue.patch."""
    with cluster.elastic(BUSY, tmp_path, hosts={"localhost": 1, "127.0.0.1": 1}) as job:
        result = job.result(120)
    assert result.exit_code == 0, result
    (sent,) = [fact for fact in result.told if "sent" in fact]
    assert sent["sent"] > 20
    assert sent["left"] == 0
    assert [fact["end"] for fact in result.told if "end" in fact] == [[1.0] * 20]


def test_optimizers_are_numbered_afresh_when_horovod_is_initialised_anew(cluster):
    """One rank has used more optimizers than the other by then, as one that is older has."""

    def case():
        import os

        import harness
        import torch
        from torch_job import assert_equal_bits

        import adacons_hvd.torch as hvd
        from adacons_hvd import AdaCons
        from adacons_hvd.torch.numbering import numbering

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
                    numbering.take(hvd.global_process_set.process_set_id)
                hvd.shutdown()
                # Over Gloo a rank that comes first finds the others' old addresses, and waits for them in vain; and
                # of the ranks of a host the launcher may have kept them for good, so this is another host now.
                harness.gather(None)
                os.environ["HOROVOD_HOSTNAME"] = "anew"
                hvd.init()
                hvd.init()  # does nothing, also to numbers
        assert_equal_bits([kept, other])
        return optimizer._reducer.name, second._reducer.name, optimizer.report.steps

    assert cluster.run(case, fresh=True) == [("adacons.0", "adacons.1", 4)] * 2
