"""What gradients tell of training and of workers, from the statistics that every step has.

Wrap an aggregator to ask for it. Nothing more is sent, and nothing waits for an accelerator:

>>> from adacons_hvd import AdaCons
>>> from adacons_hvd.insight import SickWorkers
>>> SickWorkers(AdaCons(), policy="exclude").needs
'the Gramian of all gradients'

- :class:`MovingAverages` keeps the averages that ``report.noise_scale`` and ``report.adascale_gain`` are made of.
- :class:`SickWorkers` does that, too, and names the workers whose gradients have gone bad.

``docs/noise-scale.md``, ``docs/adascale.md`` and ``docs/sick-workers.md`` say what the numbers mean.
"""

from .averages import MovingAverages
from .sick_workers import SickWorker, SickWorkers

__all__ = ["MovingAverages", "SickWorker", "SickWorkers"]
