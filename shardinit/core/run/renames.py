"""Renames: how the leaves of one naming make the tensors of another, one pair a line.

    # the leaf, the tensor, and what changes on the way
    embed/embedding         -> model.embed_tokens.weight
    layers/*/mlp/up/kernel  -> model.layers.*.mlp.up_proj.weight : transpose
    layers/mlp/down/kernel  -> model.layers.{layer}.mlp.down.weight : unstack, transpose
    layers/*/attn/q/kernel  -> h.*.c_attn.weight : flatten 1, fuse 1
    layers/*/attn/k/kernel  -> h.*.c_attn.weight : flatten 1, fuse 1

A ``*`` or a ``{name}`` is one key or number, ``**`` one key or several; ``{name+3}`` on
the right adds to a number. The words behind the colon:

* ``transpose N``: the first N axes (1) become the last of two, the rest the first, as
  torch keeps the weight of a linear layer.
* ``flatten N``: the first N axes become one, and the rest; without N all are one.
* ``unstack N``: a name that only the tensor has counts along axis N (0) of the leaf.
* ``stack N``: a name that only the leaf has counts along axis N (0) of the tensor.
* ``repeat N``: the leaf N times over, along an axis of its own of the tensor, or as N
  tensors that a name which only they have counts.
* ``fuse N``: the tensor is the leaves of several lines, one after the other, along its
  axis N (0).
* ``split N``: the leaf is cut into equal parts along the tensors' axis N (0); the
  tensors stand behind the arrow, with commas between them.
* ``copy``: the leaf is another line's too.
* ``noise S``: normal numbers of standard deviation S are added, others in each place.

A leaf is renamed by the first line that matches it, and by those that say ``copy``.
"""

from __future__ import annotations

import functools
import itertools
import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from shardinit.errors import SelectError

_WILD = re.compile(r"\*\*|\*|\{(\w+)(?:\+(\d+))?\}")
_NUMBERED = ("transpose", "flatten", "unstack", "stack", "repeat", "fuse", "split")
_WORDS = (*_NUMBERED, "copy", "noise")


@dataclass(frozen=True)
class Rename:
    """One line.

    Attributes:
      line: its text, for errors.
      source: the pattern of leaf paths.
      targets: the patterns of tensors' names: one, or several of a split.
      words: what changes on the way, each with its number or None.
      noise: standard deviation of what is added.
    """

    line: str
    source: str
    targets: tuple[str, ...]
    words: Mapping[str, int | None]
    noise: float = 0.0

    @functools.cached_property
    def _pattern(self) -> tuple[re.Pattern[str], tuple[str, ...]]:
        names, text, end = [], "", 0
        for name, found in _wilds(self.source):
            text += re.escape(self.source[end : found.start()])
            text += "(.+)" if found[0] == "**" else "([^/.]+)"
            names.append(name)
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

    def counts(self) -> bool:
        """Whether a name that only the tensors have counts what is repeated."""
        return "repeat" in self.words and bool(self.free()) and not self._unstacks

    @property
    def _unstacks(self) -> bool:
        return "unstack" in self.words

    def names(self, values: Mapping[str, str]) -> list[str]:
        """The tensors' names, with what the wildcards stand for."""
        try:
            return [_filled(target, values) for target in self.targets]
        except ValueError as error:
            got = f"it adds to {sorted(values.values())}"
            raise self.fault(got, "numbers") from error

    def fault(self, got: str, expected: str) -> SelectError:
        """An error that shows the line."""
        return SelectError(f"line {self.line!r}", got, expected)


def _wilds(pattern: str) -> list[tuple[str, re.Match[str]]]:
    """The wildcards of a pattern with their names; stars are counted."""
    stars = itertools.count()
    return [(m[1] or f"*{next(stars)}", m) for m in _WILD.finditer(pattern)]


def _names(pattern: str) -> tuple[str, ...]:
    return tuple(name for name, _ in _wilds(pattern))


def _filled(pattern: str, values: Mapping[str, str]) -> str:
    text, end = "", 0
    for name, found in _wilds(pattern):
        value = values[name]
        more = int(found[2] or 0)
        text += pattern[end : found.start()] + (
            str(int(value) + more) if more else value
        )
        end = found.end()
    return text + pattern[end:]


Lines = str | os.PathLike[str] | Iterable[str] | Mapping[str, str]
"""Lines of pairs, a text or a file of them, or a mapping of leaves to tensors."""


def renames_of(given: Lines, argument: str) -> tuple[Rename, ...]:
    """The renames that a user gives, in whichever form.

    Args:
      given: lines, a text of them (which has an arrow), a file, or a mapping.
      argument: what the user knows it as.

    Raises:
      SelectError: a line that says none, or a file that cannot be read.

    Example:
      >>> from shardinit.core.run.renames import renames_of
      >>> renames_of({"w": "weight : transpose"}, "paths")[0].words
      {'transpose': None}
    """
    if isinstance(given, Mapping):
        return renames(f"{leaf} -> {tensor}" for leaf, tensor in given.items())
    if isinstance(given, str) and "->" in given:
        return renames(given)
    if isinstance(given, str | os.PathLike):
        try:
            return renames(Path(given).read_text("utf-8"))
        except (OSError, UnicodeError) as error:
            raise SelectError(
                f"{argument}={os.fspath(given)!r}",
                f"it cannot be read ({error})",
                "lines of `leaf -> tensor`, a mapping, or a file of such lines",
            ) from error
    return renames(given)


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
    given = dict(_word(line, text.strip()) for text in said.split(",") if text.strip())
    words = {
        word: int(number) if word in _NUMBERED and number else None
        for word, number in given.items()
    }
    targets = tuple(part.strip() for part in target.split(","))
    made = Rename(line, source, targets, words, float(given.get("noise", 0)))
    _check(made)
    return made


def _word(line: str, text: str) -> tuple[str, str]:
    """A word of a line and its number, empty where it has none."""
    word, _, number = (part.strip() for part in text.partition(" "))
    if not _is_word(word, number):
        expected = ", ".join(_WORDS)
        raise SelectError(
            f"line {line!r}", f"got {text!r}", f"one of {expected}, with its number"
        )
    return word, number


def _is_word(word: str, number: str) -> bool:
    if word == "noise":
        return _is_positive(number)
    if word == "repeat":
        return number.isdigit() and int(number) > 0
    numbered = word in _NUMBERED and number.isdigit()
    return word in _WORDS and (not number or numbered)


def _is_positive(number: str) -> bool:
    try:
        return 0 < float(number) < math.inf
    except ValueError:
        return False


def _check(rename: Rename) -> None:
    words = rename.words
    if (len(rename.targets) > 1) != ("split" in words):
        raise rename.fault("several tensors and split go together", "both or neither")
    repeats = "repeat" in words
    for word, names, side, other in (
        ("unstack", rename.free(), "tensor", repeats and len(rename.free()) == 1),
        ("stack", rename.bound(), "leaf", repeats and not rename.bound()),
    ):
        if bool(names) != (word in words) and not other:
            raise rename.fault(
                f"{len(names)} wildcards that only the {side} has",
                f"{word} where there are such, and only there",
            )
    if "transpose" in words and "flatten" in words:
        raise rename.fault("transpose and flatten", "one of them: both merge axes")
