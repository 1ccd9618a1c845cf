"""Patterns: regular expressions of strangers, matched by RE2.

Python's own take time that doubles with every letter of some patterns, and hold the
interpreter meanwhile; RE2's take time in proportion to the path, whatever the pattern
is. In return it knows neither lookaround nor back-references. Only servers match.
"""

from __future__ import annotations

import functools
from typing import Any

_MEMORY = 1 << 20  # bytes that a compiled pattern may take


@functools.lru_cache(maxsize=4096)
def _compiled(pattern: str) -> Any:
    import re2  # of servers only, and not needed to talk to one

    options = re2.Options()
    options.max_mem = _MEMORY
    options.log_errors = False
    return re2.compile(pattern, options)


def fault(pattern: str) -> str:
    """What is wrong with a pattern; empty if nothing is.

    Example:
      >>> fault("kernel$"), fault("(?=kernel)")
      ('', "RE2 refuses '(?=kernel)' (invalid perl operator: (?=)")
    """
    import re2

    try:
        _compiled(pattern)
    except (re2.error, UnicodeError) as error:
        said = error.args[0]
        why = said.decode(errors="replace") if isinstance(said, bytes) else said
        return f"RE2 refuses {pattern!r} ({why})"
    return ""


def found(pattern: str, path: str) -> bool:
    """Whether a pattern is found anywhere in a path.

    Example:
      >>> found("norm", "layers/0/norm/scale")
      True
    """
    return _compiled(pattern).search(path) is not None
