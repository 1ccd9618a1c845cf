"""Measurements, side by side: what shardinit takes, and what plain JAX takes for it.

A number alone says more about the machine than about the code, so each figure here is
a ratio: both sides run on one machine, in one run, in turns, each in a fresh process
that does nothing else, and the table shows medians with their spread. What must be
reached stands beside what was. Timings belong here and never in a unit test.

    python -m shardinit.bench --case cold,warm,memory,plan --json results.json

A family of cases is one module named in ``FAMILIES``; it registers what it measures
as a `shardinit.bench.case.Case`. This process never imports JAX, only its children do:
the peak memory of a child counts what its parent had when it was started.
"""

FAMILIES = (
    "cold",
    "scanned",
    "again",
    "deviceless",
    "warm",
    "draws",
    "orthogonal",
    "planning",
    "shell",
    "training",
    "many",
    "large",
    "parts",
    "completion",
    "peers",
    "frontends",
    "torch",
    "deferred",
    "keeping",
    "serving",
    "streaming",
)
