"""An aggregator for PyTorch's own ``DistributedDataParallel``, without Horovod.

    model = DistributedDataParallel(model)
    optimizer = torch.optim.Adam(model.parameters())
    adacons_hvd.ddp.attach(model, optimizer, AdaCons())      # the one new line

Everything else about the script stays, and so does how it is started: ``torchrun``.
"""

from .attaching import attach, gather_history

__all__ = ["attach", "gather_history"]
