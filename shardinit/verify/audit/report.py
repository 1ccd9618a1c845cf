"""What an audit found: a row for each program, the plan's sums, and a verdict.

The promise that is audited: a device makes its own shard and nothing else. So a program
fails when its output is not the shard in the chip's layout, when its temporaries exceed
a mebibyte plus a tenth of the shard, when devices talk to each other, or when a value
as large as the whole leaf exists anywhere. A program that makes its leaf block by block
(an orthogonal matrix) may hold blocks: half of the whole leaf, and the report
says how much it is. The plan fails when a large leaf lies whole
on every device, which nobody means, or when the chip's memory does not hold it all.
"""

from __future__ import annotations

import dataclasses
import html
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from shardinit.core.plan import text_table as table
from shardinit.short import plural, short_repr

FLOOR_BYTES = 1 << 20  # below this nothing is large
SHARE = 10  # temporaries may take one part in so many of the shard beyond the floor
BLOCKS = 2  # a blockwise program: one part in so many of the whole leaf in float32


@dataclass(frozen=True)
class AuditRow:
    """One program, compiled by the chip's own compiler.

    Attributes:
      program: its number in ``plan.programs``.
      paths: the leaves it makes, in the order of the pytree.
      shapes: global shape of each of its results; dtypes: their dtypes.
      specs: the partition spec of each.
      shard_bytes: of all its results on one device, elements alone.
      padded_bytes: the same in the layout that the compiler chose.
      host_bytes: those of them that lie in a host's memory. A device makes them in its
        own and copies them, so while the program runs they are temporaries.
      output_bytes: what the executable allocates for all of them.
      temporary_bytes: what it allocates beside them while it runs.
      code_bytes: of the executable itself.
      collectives: instructions with which devices talk to each other.
      full_size: materialised values as large as a whole leaf that is sharded.
      bytes_moved: through main memory, at least, in one run.
      seconds: of one run, at the chip's published bandwidth; 0 if that is unknown.
      whole: why every device computes the full leaf; empty if it does not.
      blockwise: whether it makes its shard in a loop over blocks.
      faults: what is wrong with it; empty if nothing is.

    Example:
      >>> import jax, shardinit
      >>> mesh = jax.sharding.AbstractMesh((2,), ("data",))
      >>> init = lambda key: jax.random.normal(key, (64, 32))
      >>> plan = shardinit.plan(init, mesh=mesh, rules=shardinit.fsdp(min_bytes=0))
      >>> (row,) = shardinit.audit(plan, "cpu:2").rows
      >>> row.shard_bytes, row.collectives, row.ok
      (4096, (), True)
    """

    __repr__ = short_repr

    program: int
    paths: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[str, ...]
    specs: tuple[str, ...]
    shard_bytes: int
    padded_bytes: int
    host_bytes: int
    output_bytes: int
    temporary_bytes: int
    code_bytes: int
    collectives: tuple[str, ...]
    full_size: tuple[str, ...]
    bytes_moved: int
    seconds: float
    whole: str
    blockwise: bool
    faults: tuple[str, ...]

    @property
    def allowed_temporary_bytes(self) -> int:
        """What its temporaries may take."""
        allowed = self.shard_bytes // SHARE
        if self.blockwise:
            full = 4 * sum(math.prod(shape) for shape in self.shapes)
            allowed = max(allowed, full // BLOCKS)
        return FLOOR_BYTES + self.host_bytes + allowed

    @property
    def ok(self) -> bool:
        """Whether it keeps the promise."""
        return not self.faults

    @property
    def runs(self) -> int:
        """How often it runs in one initialisation."""
        return len(self.paths) // len(self.shapes)


@dataclass(frozen=True)
class AuditReport:
    """The audit of a plan.

    Attributes:
      name: of the model; topology: what it was compiled for; mesh: axis sizes.
      versions: of JAX and of the compiler.
      rows: one for each program.
      leaves: how many leaves the plan makes; host_leaves: those among them that are
        constants or keys and need no program.
      bytes_per_device: of all shards in a device's own memory, elements alone.
      host_bytes_per_device: of a device's shards that lie in its host's.
      padded_bytes_per_device: of the former as they lie in the chip's memory.
      largest_temporary: of any program; peak_bytes: that and all padded shards.
      memory_bytes: of one device; 0 if unknown.
      bytes_moved: on one device by all runs; seconds: at the published bandwidth.
      whole: leaves that cannot be sharded, each with the reason.
      faults: everything that is wrong, each with the leaf it is wrong about.

    Example:
      >>> import jax, shardinit
      >>> mesh = jax.sharding.AbstractMesh((2,), ("data",))
      >>> init = lambda key: jax.random.normal(key, (64, 32))
      >>> plan = shardinit.plan(init, mesh=mesh, rules=shardinit.fsdp(min_bytes=0))
      >>> report = shardinit.audit(plan, "cpu:2")
      >>> report.summary()[-1], report.to_data()["ok"]
      ('verdict: ok', True)
      >>> report.table()[0][3:6]
      ('64x32', 'float32', "P('data',)")
      >>> report.screen()[0][9:]  # no collectives, and no time that is known
      ('', '4,116', '', 'ok')
    """

    name: str
    topology: str
    mesh: dict[str, int]
    versions: str
    rows: tuple[AuditRow, ...]
    leaves: int
    host_leaves: int
    bytes_per_device: int
    host_bytes_per_device: int
    padded_bytes_per_device: int
    largest_temporary: int
    peak_bytes: int
    memory_bytes: int
    bytes_moved: int
    seconds: float
    whole: tuple[tuple[str, str], ...]
    faults: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """The verdict."""
        return not self.faults

    def to_data(self) -> dict[str, Any]:
        """The report as plain data, for JSON."""
        return {"ok": self.ok, **dataclasses.asdict(self)}

    # Without an annotation, with which a dataclass takes it for a field.
    HEADER = (
        "program",
        "leaves",
        "first path",
        "shape",
        "dtype",
        "sharding",
        "shard",
        "padded",
        "temporaries",
        "collectives",
        "moved",
        "time",
        "",
    )

    def table(self) -> list[tuple[str, ...]]:
        """The rows as text, in the order of ``HEADER``."""
        return [
            (
                str(row.program),
                str(len(row.paths)),
                row.paths[0] + (" …" if len(row.paths) > 1 else ""),
                ", ".join("x".join(map(str, s)) or "scalar" for s in row.shapes),
                ", ".join(dict.fromkeys(row.dtypes)),
                ", ".join(dict.fromkeys(row.specs)),
                f"{row.shard_bytes:,}",
                f"{row.padded_bytes:,}",
                f"{row.temporary_bytes:,}",
                str(len(row.collectives)),
                f"{row.bytes_moved:,}",
                f"{row.seconds * 1e6:,.1f} µs" if row.seconds else "-",
                "ok" if row.ok else "FAILS",
            )
            for row in self.rows
        ]

    def screen(self) -> list[tuple[str, ...]]:
        """The rows without what says nothing: zeros and dashes of a whole column.

        Nor does a shard's size in memory where no shard is padded.
        """
        rows = self.table()
        shard, padded = map(self.HEADER.index, ("shard", "padded"))
        empty = {
            column
            for column in range(len(self.HEADER))
            if {row[column] for row in rows} <= {"0", "-"}
        }
        if all(row[padded] == row[shard] for row in rows):
            empty.add(padded)
        return [
            tuple("" if n in empty else cell for n, cell in enumerate(row))
            for row in rows
        ]

    def summary(self) -> list[str]:
        """The plan's sums and the verdict, a line each."""
        fits = f" of {self.memory_bytes:,}" if self.memory_bytes else ""
        share = f" ({self.peak_bytes / self.memory_bytes:.2%})" if fits else ""
        host = self.host_bytes_per_device
        lines = [
            f"{self.name} on {self.topology} as {self.mesh}: "
            f"{plural(self.leaves, 'leaf')}, {plural(len(self.rows), 'program')}, "
            f"compiled by {self.versions}",
            f"bytes a device: {self.bytes_per_device:,} in shards, "
            f"{self.padded_bytes_per_device:,} as they lie in memory, "
            f"{self.peak_bytes:,}{fits} with the largest temporaries{share}"
            + (f"; {host:,} in its host's memory" if host else ""),
            f"bytes moved a device: {self.bytes_moved:,} at least"
            + (
                f", {self.seconds:.3g} s at the published bandwidth"
                if self.seconds
                else ""
            ),
        ]
        if self.host_leaves:
            leaves = plural(self.host_leaves, "leaf")
            lines.append(f"made on the host, not compiled: {leaves}")
        lines += [
            f"made block by block: {row.paths[0]}, {row.temporary_bytes:,} bytes of "
            f"blocks at a time"
            for row in self.rows
            if row.blockwise
        ]
        lines += [f"cannot be sharded: {path} ({why})" for path, why in self.whole]
        lines += [f"fault: {fault}" for fault in self.faults]
        count = len(self.faults)
        lines.append("verdict: ok" if self.ok else f"verdict: FAILS, {count} fault(s)")
        return lines

    def __repr__(self) -> str:
        outcome = "ok" if self.ok else plural(len(self.faults), "fault")
        return (
            f"<AuditReport of {self.name} on {self.topology}: {outcome}, "
            f"{plural(self.leaves, 'leaf')}, {plural(len(self.rows), 'program')}>"
        )

    def __str__(self) -> str:
        body = table.as_text(self.HEADER, self.table())
        return "\n".join([body, *self.summary()])

    def _repr_html_(self) -> str:
        lines = "".join(f"<p>{html.escape(line)}</p>" for line in self.summary())
        return table.as_html(self.HEADER, self.table()) + lines


def faults_of(
    row: AuditRow, expected: Sequence[str], found: Sequence[str]
) -> list[str]:
    """What is wrong with one program.

    Args:
      row: all about it but its faults.
      expected: shape of each result's shard, by the plan.
      found: shape of each result, as compiled.

    Example:
      >>> import jax, shardinit
      >>> mesh = jax.sharding.AbstractMesh((2,), ("data",))
      >>> init = lambda key: jax.random.normal(key, (64, 32))
      >>> plan = shardinit.plan(init, mesh=mesh, rules=shardinit.fsdp(min_bytes=0))
      >>> (row,) = shardinit.audit(plan, "cpu:2").rows
      >>> faults_of(row, ["f32[32,32]"], ["f32[64,32]"])
      ['returns f32[64,32], its shard is f32[32,32]']
    """
    faults = []
    if list(expected) != list(found):
        faults.append(f"returns {', '.join(found)}, its shard is {', '.join(expected)}")
    if row.output_bytes != row.padded_bytes:
        faults.append(
            f"allocates {row.output_bytes:,} bytes for a shard that takes "
            f"{row.padded_bytes:,} in its layout"
        )
    if row.temporary_bytes > row.allowed_temporary_bytes:
        share = "half of the leaf" if row.blockwise else "a tenth of its shard"
        host = ", and what goes to its host" if row.host_bytes else ""
        faults.append(
            f"holds {row.temporary_bytes:,} bytes of temporaries, more than "
            f"{row.allowed_temporary_bytes:,} (1 MiB and {share}{host})"
        )
    if row.collectives:
        kinds = Counter(text.split(" ")[0] for text in row.collectives)
        counts = ", ".join(f"{n} {kind}" for kind, n in sorted(kinds.items()))
        faults.append(f"makes devices communicate: {counts}")
    if row.full_size:
        faults.append(f"holds values as large as the leaf: {first_of(row.full_size)}")
    return faults


def first_of(items: Sequence[str]) -> str:
    """Some of the items as text, and how many more there are.

    Example:
      >>> first_of(["a", "b", "c", "d", "e"])
      'a, b, c and 2 more'
    """
    shown = ", ".join(items[:3])
    return shown + (f" and {len(items) - 3} more" if len(items) > 3 else "")
