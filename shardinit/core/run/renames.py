"""Renames: how the leaves of one naming make the tensors of another, one pair a line.

    # the leaf, the tensor, and what changes on the way
    embed/embedding         -> model.embed_tokens.weight
    layers/*/mlp/up/kernel  -> model.layers.*.mlp.up_proj.weight : transpose
    layers/mlp/down/kernel  -> model.layers.{layer}.mlp.down.weight : unstack, transpose
    layers/*/attn/q/kernel  -> h.*.c_attn.weight : flatten 1, fuse 1
    layers/*/attn/k/kernel  -> h.*.c_attn.weight : flatten 1, fuse 1

A ``*`` or a ``{name}`` is one key or number; ``{name+3}`` on the right adds to it. The
words behind the colon:

* ``transpose N``: the first N axes (1) become the last of two, the rest the first, as
  torch keeps the weight of a linear layer.
* ``flatten N``: the first N axes become one, and the rest; without N all are one.
* ``unstack``: a name that only the tensor has counts along a leading axis of the leaf.
* ``stack``: a name that only the leaf has counts along a leading axis of the tensor.
* ``fuse N``: the tensor is the leaves of several lines, one after the other, along its
  axis N (0).
* ``split N``: the leaf is cut into equal parts along the tensors' axis N (0); the
  tensors stand behind the arrow, with commas between them.
* ``copy``: the leaf is another line's too.

A leaf is renamed by the first line that matches it, and by those that say ``copy``.
"""

from __future__ import annotations

import functools
import itertools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from shardinit.core.run.parts import Part, Tensor
from shardinit.errors import SelectError

_WILD = re.compile(r"\*|\{(\w+)(?:\+(\d+))?\}")
_WORDS = ("transpose", "flatten", "unstack", "stack", "fuse", "split", "copy")
_NUMBERED = ("transpose", "flatten", "fuse", "split")


@dataclass(frozen=True)
class Rename:
    """One line.

    Attributes:
      line: its text, for errors.
      source: the pattern of leaf paths.
      targets: the patterns of tensors' names: one, or several of a split.
      words: what changes on the way, each with its number or None.
    """

    line: str
    source: str
    targets: tuple[str, ...]
    words: Mapping[str, int | None]

    @functools.cached_property
    def _pattern(self) -> tuple[re.Pattern[str], tuple[str, ...]]:
        names, text, end = [], "", 0
        for found in _WILD.finditer(self.source):
            text += re.escape(self.source[end : found.start()]) + "([^/.]+)"
            names.append(_name(found, len(names)))
            end = found.end()
        return re.compile(text + re.escape(self.source[end:])), tuple(names)

    def matched(self, path: str) -> dict[str, str] | None:
        """What the wildcards stand for in a leaf's path; None if it is another's."""
        pattern, names = self._pattern
        found = pattern.fullmatch(path)
        return None if found is None else dict(zip(names, found.groups(), strict=True))

    def free(self) -> tuple[str, ...]:
        """Wildcards that only the tensor has, in order."""
        _, names = self._pattern
        return tuple(n for n in _names(self.targets[0]) if n not in names)

    def bound(self) -> tuple[str, ...]:
        """Wildcards that only the leaf has, in order."""
        _, names = self._pattern
        return tuple(n for n in names if n not in _names(self.targets[0]))

    def names(self, values: Mapping[str, str]) -> list[str]:
        """The tensors' names, with what the wildcards stand for."""
        return [_filled(target, values) for target in self.targets]

    def fault(self, got: str, expected: str) -> SelectError:
        """An error that shows the line."""
        return SelectError(f"line {self.line!r}", got, expected)


def _name(found: re.Match[str], number: int) -> str:
    return found[1] or f"*{number}"


def _names(pattern: str) -> tuple[str, ...]:
    found = _WILD.finditer(pattern)
    return tuple(_name(match, number) for number, match in enumerate(found))


def _filled(pattern: str, values: Mapping[str, str]) -> str:
    text, end = "", 0
    for number, found in enumerate(_WILD.finditer(pattern)):
        value = values[_name(found, number)]
        more = int(found[2] or 0)
        text += pattern[end : found.start()] + (
            str(int(value) + more) if more else value
        )
        end = found.end()
    return text + pattern[end:]


def renames(lines: str | Iterable[str]) -> tuple[Rename, ...]:
    """The renames that a text says, a line each.

    Args:
      lines: the text, or its lines; empty ones and comments (``#``) do not count.

    Raises:
      SelectError: a line that says none.

    Example:
      >>> from shardinit.core.run.renames import renames
      >>> renames("w -> linear.weight : transpose")[0].targets
      ('linear.weight',)
    """
    texts = lines.splitlines() if isinstance(lines, str) else lines
    stripped = (re.sub(r"(^|\s)#.*", "", text).strip() for text in texts)
    return tuple(_rename(text) for text in stripped if text)


def _rename(line: str) -> Rename:
    sides, _, said = line.partition(" : ")
    source, arrow, target = (part.strip() for part in sides.partition("->"))
    if not (arrow and source and target):
        raise SelectError(
            f"line {line!r}", "it names no pair", "leaf -> tensor, or with : words"
        )
    words: dict[str, int | None] = {}
    for text in filter(None, (word.strip() for word in said.split(","))):
        word, _, number = text.partition(" ")
        right = word in _WORDS and (
            not number or (word in _NUMBERED and number.strip().isdigit())
        )
        if not right:
            expected = ", ".join(_WORDS)
            raise SelectError(f"line {line!r}", f"got {text!r}", f"one of {expected}")
        words[word] = int(number) if number else None
    targets = tuple(part.strip() for part in target.split(","))
    made = Rename(line, source, targets, words)
    _check(made)
    return made


def _check(rename: Rename) -> None:
    words = rename.words
    if (len(rename.targets) > 1) != ("split" in words):
        raise rename.fault("several tensors and split go together", "both or neither")
    for word, names, side in (
        ("unstack", rename.free(), "tensor"),
        ("stack", rename.bound(), "leaf"),
    ):
        if bool(names) != (word in words):
            raise rename.fault(
                f"{len(names)} wildcards that only the {side} has",
                f"{word} where there are such, and only there",
            )
    if "transpose" in words and "flatten" in words:
        raise rename.fault("transpose and flatten", "one of them: both merge axes")


# ---- which parts of leaves make which tensors ----------------------------------------


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
      >>> from shardinit.core.run import renames as names
      >>> made = names.tensors(names.renames("w -> weight : transpose"), {"w": (8, 32)})
      >>> made["weight"].shape
      (32, 8)
    """
    found: dict[str, list[tuple[Rename, Part, tuple[int, ...]]]] = {}
    left, idle = dict.fromkeys(shapes), list(lines)
    for path, shape in shapes.items():
        for line in lines:
            if path not in left and "copy" not in line.words:
                continue
            values = line.matched(path)
            if values is None:
                continue
            left.pop(path, None)
            idle = [other for other in idle if other is not line]
            for part, at in _parts(line, path, tuple(shape), values):
                found.setdefault(part.tensor, []).append((line, part, at))
    if left and every_leaf:
        path = next(iter(left))
        raise SelectError(
            f"leaf {path!r}", f"no line renames it ({len(left):,} such leaves)", "one"
        )
    if idle and every_line:
        raise idle[0].fault("it renames no leaf", "a path that is there")
    order = {id(line): number for number, line in enumerate(lines)}
    return {
        name: _joined(name, sorted(parts, key=lambda x: order[id(x[0])]))
        for name, parts in found.items()
    }


def _parts(
    line: Rename, path: str, shape: tuple[int, ...], values: dict[str, str]
) -> Iterable[tuple[Part, tuple[int, ...]]]:
    """The parts of one leaf, each with its place along stacked axes."""
    free = line.free()
    if len(free) > len(shape):
        raise line.fault(f"leaf {path!r} has {len(shape)} axes", f"{len(free)} to cut")
    inner = shape[len(free) :]
    lens = _lens(line, path, len(inner))
    at = tuple(_integer(line, values[name]) for name in line.bound())
    for lead in itertools.product(*map(range, shape[: len(free)])):
        names = line.names(values | dict(zip(free, map(str, lead), strict=True)))
        whole = Part(path, "", lead, inner, lens, "transpose" in line.words)
        if "split" not in line.words:
            yield whole.named(names[0]), at
            continue
        axis, count, made = line.words["split"] or 0, len(names), whole.tensor_shape
        if axis >= len(made) or made[axis] % count:
            raise line.fault(f"leaf {path!r} makes {made}", f"{count} equal parts")
        for number, name in enumerate(names):
            yield whole.cut(name, axis, number, count), at


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


def _joined(name: str, parts: Sequence[tuple[Rename, Part, tuple[int, ...]]]) -> Tensor:
    """One tensor of its parts: stacked along leading axes, fused along one."""
    line = parts[0][0]
    columns = zip(*(at for _, _, at in parts), strict=True)
    ranks = [sorted(set(column)) for column in columns]
    groups: dict[tuple[int, ...], list[Part]] = {}
    for other, part, at in parts:
        if (other.words.get("fuse", -1), len(at)) != (
            line.words.get("fuse", -1),
            len(ranks),
        ):
            raise other.fault(f"{name!r} has another line", "fuse or stack in both")
        place = tuple(r.index(n) for r, n in zip(ranks, at, strict=True))
        groups.setdefault(place, []).append(part)
    placed, shapes = [], set()
    for place, group in groups.items():
        if len(group) > 1 and "fuse" not in line.words:
            raise line.fault(f"{name!r} is several leaves", "fuse, or other names")
        end, axis = 0, line.words.get("fuse") or 0
        for part in group:
            placed.append(part.placed(place, axis, end))
            end += part.tensor_shape[axis] if part.tensor_shape else 0
        whole = list(group[0].tensor_shape)
        if len(group) > 1:
            whole[axis] = end
        shapes.add(tuple(whole))
    lead = tuple(map(len, ranks))
    if len(shapes) > 1 or len(groups) != math.prod(lead):
        raise line.fault(f"{name!r} is of {sorted(shapes)}", "equal shapes, all there")
    return Tensor(name, (*lead, *shapes.pop()), tuple(placed))
