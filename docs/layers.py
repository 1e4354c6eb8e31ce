"""Draws the layers of the package from its imports: ``python docs/layers.py`` writes ``docs/layers.svg``.

Each box is a folder or a module of ``adacons_hvd``; an arrow leads from what imports to what is imported, and left out
where a longer way leads to the same. Imports for the sake of types alone, and those inside of functions, do not count.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "adacons_hvd"

#: The layers from top to bottom: what is in a row imports nothing of its own row, or of a row above.
ROWS = (
    ("cli", "lightning", "transformers"),
    ("logging",),
    ("keras", "fsdp"),
    ("torch", "tensorflow", "ddp", "horovod_build"),
    ("torch_amp", "torch_gradients", "engine"),
    ("report", "agreement", "calibration"),
    ("costs",),
    ("schedules", "insight"),
    ("aggregators", "collectives"),
    ("ops",),
    ("torch_host",),
)
#: Modules that belong to another layer than their folder says, because users know them by this name.
ELSEWHERE = {"adacons_hvd.tensorflow.keras": "keras"}


def layer_of(module: str) -> str | None:
    """The layer of a module; None for the package itself and what it defines."""
    for prefix, layer in ELSEWHERE.items():
        if module == prefix or module.startswith(prefix + "."):
            return layer
    parts = module.split(".")
    name = parts[1] if len(parts) > 1 else ""
    return name if name and ((PACKAGE / name).is_dir() or (PACKAGE / f"{name}.py").exists()) else None


def arrows() -> set[tuple[str, str]]:
    """(importing layer, imported layer), for all modules of the package."""
    found = set()
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        package = parts[:-1]
        module = ".".join(package if parts[-1] == "__init__" else parts)
        for imported in _imported(ast.parse(path.read_text(encoding="utf-8")), package):
            pair = layer_of(module), layer_of(imported)
            if None not in pair and pair[0] != pair[1]:
                found.add(pair)
    return found  # type: ignore[return-value]


def _imported(tree: ast.Module, package: tuple[str, ...]) -> Iterator[str]:
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.level:
            base = [*package[: len(package) - node.level + 1], *([node.module] if node.module else [])]
            for alias in node.names:
                yield ".".join([*base, alias.name])


def direct(found: set[tuple[str, str]]) -> set[tuple[str, str]]:
    """The arrows without those that only shorten a longer way."""
    below: dict[str, set[str]] = {}
    for above, under in found:
        below.setdefault(above, set()).add(under)

    def reaches(start: str, end: str) -> bool:
        return any(step == end or reaches(step, end) for step in below.get(start, ()))

    return {(a, b) for a, b in found if not any(reaches(step, b) for step in below[a] - {b})}


def picture() -> str:
    """The picture, as SVG."""
    width, height, gap, box = 860, 74, 18, 34
    place = {}
    shapes = []
    for row, names in enumerate(ROWS):
        each = (width - gap * (len(names) + 1)) / len(names)
        wide = min(each, 190.0)
        for column, name in enumerate(names):
            centre = gap + (each + gap) * column + each / 2
            top = 16 + row * height
            place[name] = (centre, top)
            shapes.append(
                f'<rect x="{centre - wide / 2:.0f}" y="{top}" width="{wide:.0f}" height="{box}" rx="5" '
                'fill="#eef3f8" stroke="#5b7a99"/>'
                f'<text x="{centre:.0f}" y="{top + 22}" text-anchor="middle">{name}</text>'
            )
    lines = []
    for above, under in sorted(direct(arrows())):
        (x, y), (to_x, to_y) = place[above], place[under]
        lines.append(
            f'<line x1="{x:.0f}" y1="{y + box}" x2="{to_x:.0f}" y2="{to_y - 2}" stroke="#5b7a99" '
            'marker-end="url(#head)"/>'
        )
    total = 16 + len(ROWS) * height
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {total}" font-family="sans-serif" '
        'font-size="14">\n<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
        'markerHeight="7" orient="auto"><path d="M0 0L8 4L0 8z" fill="#5b7a99"/></marker></defs>\n'
        + "\n".join([*lines, *shapes])
        + "\n</svg>\n"
    )


if __name__ == "__main__":
    (ROOT / "docs" / "layers.svg").write_text(picture(), encoding="utf-8")
