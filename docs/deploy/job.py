"""Train on a Ray or a Spark cluster, through Horovod's own integrations."""

import sys


def train(learning_rate: float) -> float:
    """Runs on every worker, in a process of its own."""
    import torch

    import adacons_hvd.torch as hvd

    hvd.init()
    model = torch.nn.Linear(10, 1)
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate)
    optimizer = hvd.DistributedOptimizer(optimizer, model.named_parameters(), aggregator=hvd.AdaCons())
    for _ in range(100):
        optimizer.zero_grad()
        x = torch.randn(32, 10)
        loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
        loss.backward()
        optimizer.step()
    return loss.item()


def on_ray() -> list[float]:
    """`ray job submit -- python job.py ray`"""
    import ray
    from horovod.ray import RayExecutor

    ray.init()
    executor = RayExecutor(RayExecutor.create_settings(timeout_s=60), num_workers=2, use_gpu=False)
    executor.start()
    losses: list[float] = executor.run(train, kwargs={"learning_rate": 1e-2})
    executor.shutdown()
    return losses


def on_spark() -> list[float]:
    """`spark-submit job.py spark`"""
    import horovod.spark
    from pyspark.sql import SparkSession

    SparkSession.builder.appName("adacons").getOrCreate()
    losses: list[float] = horovod.spark.run(train, kwargs={"learning_rate": 1e-2}, num_proc=2, use_gloo=True)
    return losses


if __name__ == "__main__":
    print({"ray": on_ray, "spark": on_spark}[sys.argv[1]]())
