"""Nothing of Horovod is imported or needed."""

from __future__ import annotations

import pytest

SCRIPT = """
import sys

# This process may have been forked from one that has imported it all, where Horovod could be had.
assert not any(name.split(".")[0] == "horovod" for name in sys.modules)
for name in [name for name in sys.modules if name.split(".")[0] == "adacons_hvd"]:
    del sys.modules[name]

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "horovod":
            raise ModuleNotFoundError("No module named 'horovod'", name="horovod")

sys.meta_path.insert(0, Absent())
try:
    import horovod
except ModuleNotFoundError:
    pass
else:
    raise SystemExit("the blocker does not block")

import doctest
import torch
import adacons_hvd.ddp, adacons_hvd.fsdp
import adacons_hvd.ddp.attaching, adacons_hvd.fsdp.attaching
import adacons_hvd.engine.session, adacons_hvd.collectives.distributed

# Each example starts the process group, which a process should do once.
torch.distributed.init_process_group("gloo")
torch.distributed.init_process_group = lambda backend: None
failed = tried = 0
for module in (
    adacons_hvd.collectives.distributed,
    adacons_hvd.ddp.attaching,
    adacons_hvd.fsdp.attaching,
    adacons_hvd.engine.session,
):
    result = doctest.testmod(module)
    failed, tried = failed + result.failed, tried + result.attempted
torch.distributed.destroy_process_group()
assert not any(name.split(".")[0] == "horovod" for name in sys.modules)
assert tried > 10 and not failed, (tried, failed)
"""


@pytest.mark.ranks(2, launcher="torchrun")
@pytest.mark.time_limit(120)
def test_the_documented_examples_run_without_horovod(cluster):
    result = cluster.script(SCRIPT, forked=True)
    assert result.exit_code == 0, result.log + "".join(result.stdout + result.stderr)
