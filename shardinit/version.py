"""Versions: this library's own, and how those of others compare."""

from __future__ import annotations

from packaging.version import InvalidVersion, Version

__version__ = "0.1.0"


def release(version: str) -> tuple[int, ...]:
    """Major, minor and micro number of a version; empty if it is none.

    A pre-release counts as its release, as JAX's own checks of versions have it.

    Example:
      >>> release("0.12.0.1"), release("0.10.2.dev20260101"), release("newest")
      ((0, 12, 0), (0, 10, 2), ())
    """
    if len(version) > 64:  # it may come from a stranger
        return ()
    try:
        found = Version(version)
    except InvalidVersion:
        return ()
    return found.major, found.minor, found.micro
