"""A job of Ray Train's: ``python ray_job.py FOLDER``. A worker fails on the way, and both go on from the checkpoint."""

from __future__ import annotations

import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import ray
import ray.train as rt
import torch
import torch.distributed as dist
from ray.train.torch import TorchTrainer, prepare_model
from trainer_job import BATCH, ROWS, bits, by_hand, dataset, loss_of, network, optimizer_of

import adacons_hvd.ddp
from adacons_hvd import AdaCons

UNUSED = {"find_unused_parameters": True}


def loop(config: dict[str, Any]) -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    batches = [dataset()[part] for part in torch.arange(ROWS).split(BATCH)][rank::size]
    module = network()
    model = prepare_model(module, parallel_strategy_kwargs=UNUSED)
    optimizer: Any = optimizer_of(model)
    compiled = torch.compile(model, backend="eager")
    adacons_hvd.ddp.attach(compiled, optimizer, AdaCons())
    done = 0
    if checkpoint := rt.get_checkpoint():
        with checkpoint.as_directory() as folder:
            state = torch.load(Path(folder, "state.pt"))
        module.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        done = state["done"]
    print(f"begins with batch {done}")
    for number, batch in enumerate(batches[done:], done + 1):
        last = number % 2 == 0
        with nullcontext() if last else model.no_sync():
            with torch.autocast("cpu", torch.bfloat16):
                loss = loss_of(compiled, batch)
            (loss / 2).backward()
        if not last:
            continue
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        if number == 6:
            with tempfile.TemporaryDirectory() as folder:
                state = {"done": number, "model": module.state_dict(), "optimizer": optimizer.state_dict()}
                torch.save(state, Path(folder, "state.pt"))
                rt.report({}, checkpoint=rt.Checkpoint.from_directory(folder) if rank == 0 else None)
        if number == 10 and done == 0 and rank == 1:
            raise RuntimeError("a worker fails")
    assert done == 6, "the checkpoint was not taken up"
    assert optimizer.report.steps == 6
    settings: dict[str, Any] = {"accumulate": 2, "clip": 0.5, "dtype": torch.bfloat16, **UNUSED}
    everyone: list[Any] = [None] * size
    dist.all_gather_object(everyone, bits(module))
    assert len(set(everyone)) == 1, f"the workers hold different parameters: {everyone}"
    assert bits(module) == bits(by_hand(batches, **settings)), "not what the loop by hand makes"
    assert bits(module) != bits(by_hand(batches, aggregator=None, **settings)), "no more than an average"
    Path(config["folder"], f"worker {rank}").write_text("equal bits")


if __name__ == "__main__":
    ray.init(num_cpus=2, include_dashboard=False)
    run = rt.RunConfig(storage_path=sys.argv[1], failure_config=rt.FailureConfig(max_failures=1))
    settings = {"train_loop_config": {"folder": sys.argv[1]}, "scaling_config": rt.ScalingConfig(num_workers=2)}
    TorchTrainer(loop, run_config=run, **settings).fit()
