"""The one exception of the harness."""

from __future__ import annotations

from collections.abc import Mapping


class ClusterError(Exception):
    """A job of several processes did not end as it should; the message is the whole story.

    `ranks` maps each rank to a sentence about how it ended; it is empty when the job never started.
    """

    def __init__(self, message: str, ranks: Mapping[int, str] | None = None) -> None:
        super().__init__(message)
        self.ranks = dict(ranks or {})
