"""Tensors: which parts of which leaves make each tensor of another naming.

The lines of `renames` say it in patterns; here they meet the paths and the shapes of
leaves. What comes out are rectangles (`parts`), so that nothing is ever read in full.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence

from shardinit.core.run.parts import Part, Tensor
from shardinit.core.run.renames import Rename
from shardinit.errors import SelectError

_Placed = tuple[Rename, Part, tuple[int, ...]]
"""A part, the line that it comes of, and its place along stacked axes."""


def tensors(
    lines: Sequence[Rename],
    shapes: Mapping[str, Sequence[int]],
    *,
    every_leaf: bool = True,
    every_line: bool = True,
) -> dict[str, Tensor]:
    """The tensors that leaves make, by name.

    Args:
      lines: the renames.
      shapes: the leaves' shapes by path, in order.
      every_leaf: whether a leaf that no line renames is refused.
      every_line: whether a line that renames nothing is refused.

    Raises:
      SelectError: a leaf that no line renames, a line that renames none, or a word that
        a leaf's shape does not allow.

    Example:
      >>> from shardinit.core.run.renames import renames
      >>> from shardinit.core.run.tensors import tensors
      >>> made = tensors(renames("w -> weight : transpose"), {"w": (8, 32)})
      >>> made["weight"].shape
      (32, 8)
    """
    found: dict[str, list[_Placed]] = {}
    left, idle = dict.fromkeys(shapes), {id(line): line for line in lines}
    for path, shape in shapes.items():
        for line in lines:
            if path not in left and "copy" not in line.words:
                continue
            values = line.matched(path)
            if values is None:
                continue
            left.pop(path, None)
            idle.pop(id(line), None)
            for part, at in _parts(line, path, tuple(shape), values):
                found.setdefault(part.tensor, []).append((line, part, at))
    if left and every_leaf:
        path = next(iter(left))
        raise SelectError(
            f"leaf {path!r}", f"no line renames it ({len(left):,} such leaves)", "one"
        )
    if idle and every_line:
        line = next(iter(idle.values()))
        raise line.fault("it renames no leaf", "a path that is there")
    return _all_joined(lines, found)


def _all_joined(
    lines: Sequence[Rename], found: Mapping[str, Iterable[_Placed]]
) -> dict[str, Tensor]:
    """The tensors of their parts, those of earlier lines first."""
    order = {id(line): number for number, line in enumerate(lines)}
    return {
        name: _joined(name, sorted(parts, key=lambda x: order[id(x[0])]))
        for name, parts in found.items()
    }


def _parts(
    line: Rename, path: str, shape: tuple[int, ...], values: dict[str, str]
) -> Iterable[tuple[Part, tuple[int, ...]]]:
    """The parts of one leaf, each with its place along stacked axes."""
    free, counts = line.free(), line.counts()
    cut = 0 if counts else len(free)
    first = line.words.get("unstack") or 0
    if first + cut > len(shape):
        raise line.fault(
            f"leaf {path!r} has {len(shape)} axes", f"{first + cut} to cut"
        )
    inner = (*shape[:first], *shape[first + cut :])
    lens = _lens(line, path, len(inner))
    at = tuple(_integer(line, values[name]) for name in line.bound())
    times = line.words.get("repeat")
    leads = itertools.product(*map(range, shape[first : first + cut]))
    for lead, turn in itertools.product(leads, range(times or 1)):
        told = dict(zip(free, map(str, [turn] if counts else lead), strict=True))
        names = line.names(values | told)
        swap = "transpose" in line.words
        part = Part(path, "", lead, inner, lens, swap, lead_axis=first)
        where = at if counts or times is None else (*at, turn)
        yield from ((one, where) for one in _split(line, part, names))


def _split(line: Rename, part: Part, names: Sequence[str]) -> list[Part]:
    """A part of the tensor of that name, or in equal pieces of several tensors."""
    if "split" not in line.words:
        return [part.named(names[0])]
    axis, count, made = line.words["split"] or 0, len(names), part.tensor_shape
    if axis >= len(made) or made[axis] % count:
        raise line.fault(f"leaf {part.path!r} makes {made}", f"{count} equal parts")
    return [part.cut(name, axis, i, count) for i, name in enumerate(names)]


def _lens(line: Rename, path: str, rank: int) -> tuple[int, ...]:
    """How many of the leaf's axes become each axis of a matrix."""
    word = next((w for w in ("transpose", "flatten") if w in line.words), None)
    if word is None:
        return (1,) * rank
    first = line.words[word]
    if word == "flatten" and first is None:
        return (rank,)
    first = 1 if first is None else first
    if not 0 < first < rank:
        raise line.fault(f"leaf {path!r} has {rank} axes", f"more than {first}")
    return first, rank - first


def _integer(line: Rename, value: str) -> int:
    if not value.isdigit():
        raise line.fault(f"it stacks by {value!r}", "numbers")
    return int(value)


def _joined(name: str, parts: Sequence[_Placed]) -> Tensor:
    """One tensor of its parts: stacked along leading axes, fused along one."""
    line = parts[0][0]
    columns = zip(*(at for _, _, at in parts), strict=False)
    ranks = [sorted(set(column)) for column in columns]
    groups: dict[tuple[int, ...], list[Part]] = {}
    for other, part, at in parts:
        if _way(other, at) != _way(line, parts[0][2]):
            raise other.fault(
                f"{name!r} has another line", "the same fuse, stack and noise in both"
            )
        place = tuple(r.index(n) for r, n in zip(ranks, at, strict=True))
        groups.setdefault(place, []).append(part)
    placed, shapes = [], set()
    for place, group in groups.items():
        fused, shape = _fused(name, line, place, group)
        placed += fused
        shapes.add(shape)
    lead = tuple(map(len, ranks))
    if len(shapes) > 1 or len(groups) != math.prod(lead):
        raise line.fault(f"{name!r} is of {sorted(shapes)}", "equal shapes, all there")
    return Tensor.stacked(name, lead, shapes.pop(), placed, line.noise)


def _fused(
    name: str, line: Rename, place: tuple[int, ...], group: Sequence[Part]
) -> tuple[list[Part], tuple[int, ...]]:
    """The parts of one place along stacked axes, end to end, and their shape."""
    if len(group) > 1 and "fuse" not in line.words:
        raise line.fault(f"{name!r} is several leaves", "fuse, or other names")
    axis, stack = line.words.get("fuse") or 0, line.words.get("stack") or 0
    shape = list(group[0].tensor_shape)
    if axis >= max(1, len(shape)) or stack > len(shape):
        raise line.fault(f"{name!r} is of {tuple(shape)}", "axes that it has")
    sizes = [part.tensor_shape[axis] if shape else 0 for part in group]
    starts = itertools.accumulate(sizes, initial=0)
    pairs = zip(group, starts, strict=False)
    fused = [part.placed(place, axis, start, stack) for part, start in pairs]
    if len(group) > 1:
        shape[axis] = sum(sizes)
    return fused, tuple(shape)


def _way(line: Rename, at: tuple[int, ...]) -> tuple[object, ...]:
    """What lines that make one tensor have in common."""
    return (
        *(line.words.get(word, -1) for word in ("fuse", "stack")),
        line.noise,
        len(at),
    )
