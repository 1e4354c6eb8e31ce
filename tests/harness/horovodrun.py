"""`horovodrun`, told that Horovod was built with Gloo instead of finding that out by importing TensorFlow.

That takes 4 seconds at every start. A Horovod without Gloo still fails: in `hvd.init()`.
With that check it is started, as a module, by `adacons doctor`, and so by its tests.
"""

from __future__ import annotations

import sys

from horovod.runner import launch

if __name__ == "__main__":
    launch.gloo_built = lambda verbose=False: True
    sys.exit(launch.run_commandline())
