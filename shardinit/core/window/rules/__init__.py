"""The windowing rules, one function a primitive (see ``rule``)."""

from __future__ import annotations

# A module registers its rules when it is imported.
from shardinit.core.window.rules import elementwise as elementwise
from shardinit.core.window.rules import folds as folds
from shardinit.core.window.rules import gathers as gathers
from shardinit.core.window.rules import joins as joins
from shardinit.core.window.rules import maps as maps
from shardinit.core.window.rules import moves as moves
from shardinit.core.window.rules import scatters as scatters
from shardinit.core.window.rules import sources as sources
from shardinit.core.window.rules.rule import RULES as RULES
