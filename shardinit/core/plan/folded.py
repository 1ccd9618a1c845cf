"""Folded paths: the leaves of many layers as one, ``layers_{0..125}/mlp/up/kernel``."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Sequence

_NUMBER = re.compile(r"(\d+)")


def template(path: str) -> str:
    """The path without its numbers: paths of one template may be folded.

    Example:
      >>> template("layers_3/mlp/up/kernel")
      'layers_#/mlp/up/kernel'
    """
    return _NUMBER.sub("#", path)


def folded(paths: Sequence[str]) -> str:
    """Paths of one template as one; the first and ``…`` where that would say more.

    Example:
      >>> folded(["layers_0/w", "layers_1/w", "layers_2/w", "layers_7/w"])
      'layers_{0..2,7}/w'
      >>> folded(["0/a_1", "1/a_0"])
      '0/a_1 …'
    """
    pieces = [_NUMBER.split(path) for path in paths]
    numbers = [dict.fromkeys(column) for column in zip(*pieces, strict=True)]
    if math.prod(map(len, numbers)) != len(paths):
        return f"{paths[0]} …"
    return "".join(
        next(iter(column)) if len(column) == 1 else f"{{{_ranges(column)}}}"
        for column in numbers
    )


def _ranges(numbers: Iterable[str]) -> str:
    ordered = sorted(numbers, key=lambda text: (int(text), text))
    runs: list[list[str]] = []
    for text in ordered:
        if runs and int(text) == int(runs[-1][-1]) + 1:
            runs[-1].append(text)
        else:
            runs.append([text])
    parts = [run if len(run) < 3 else [f"{run[0]}..{run[-1]}"] for run in runs]
    return ",".join(itertools.chain(*parts))
