"""The element-wise aggregator of ``docs/aggregators.md``, the very one, in words that every framework understands."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import adacons_hvd
from adacons_hvd.ops import ops_for

_PAGE = Path(__file__).parents[1] / "docs" / "aggregators.md"
_NAMES: dict[str, Any] = {"__name__": __name__, "Aggregator": adacons_hvd.Aggregator, "ops_for": ops_for}

(_code,) = re.findall(r"^class TrimmedMean.*?(?=^\S)", _PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
exec(compile(_code, str(_PAGE), "exec"), _NAMES)
TrimmedMean = _NAMES["TrimmedMean"]
