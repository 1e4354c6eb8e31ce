"""A launcher that is forked from a process which has imported it, because torchrun takes two seconds to import PyTorch.

    python -m harness.launch TEMPLATE SCRIPT ARGUMENT ...

The launched process watches it, and ends when and as it does.
"""

from __future__ import annotations

import sys

from harness import template


def main() -> None:
    address, *what = sys.argv[1:]
    template.end_like_it(template.ask([address], 0, "harness.forked", *what)())


if __name__ == "__main__":
    main()
