"""A plan as one page: what lies where, what it takes, what is suspicious.

The page fetches nothing and needs no script to be read; a script searches and filters
rows that are there already. All text is escaped, and the page's own policy lets no
script run but that one.
"""

from __future__ import annotations

import base64
import hashlib
import html
from collections.abc import Iterable, Iterator, Sequence
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from shardinit.cli.page.layouts import described, layout_svg
from shardinit.core.plan.folded import folded, template
from shardinit.core.plan.leaves import PlanLeaf
from shardinit.core.plan.tables import alike, spec_text
from shardinit.short import plural

if TYPE_CHECKING:
    from shardinit.verify.inspect.moments import Moments

_esc = html.escape


def page(plan: Any, statistics: Any = None) -> str:
    """The page of a plan.

    Args:
      plan: on a mesh, or without one.
      statistics: what ``shardinit.inspect`` found of it; None for none.

    Example:
      >>> import jax, shardinit
      >>> plan = shardinit.plan(lambda key: {"<w>": jax.random.normal(key, (8, 32))})
      >>> "&lt;w&gt;" in page(plan), "<w>" in page(plan)
      (True, False)
    """
    here = files("shardinit.cli.page")
    css = (here / "page.css").read_text("utf-8")
    js = (here / "page.js").read_text("utf-8")
    digest = base64.b64encode(hashlib.sha256(js.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    )
    found = list(plan.findings)
    if statistics is not None:
        found += statistics.findings
    body = "\n".join(
        [
            *_head(plan),
            *_findings(found),
            *_layouts(plan),
            *_by_layer(plan),
            *_programs(plan),
            *_gains(statistics),
            *_leaves(plan, statistics),
        ]
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_esc(plan.name)}: plan</title><style>{css}</style></head>"
        f"<body>\n{body}\n<script>{js}</script></body></html>\n"
    )


def _size(count: float) -> str:
    """Bytes as people read them."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:,.0f} {unit}" if unit == "B" else f"{count:,.1f} {unit}"
        count /= 1024
    return f"{count:,.1f} TiB" if count < 1024 else f"{count / 1024:,.1f} PiB"


def _held(leaves: Iterable[Any]) -> int:
    """Bytes of some leaves' shards of one device."""
    return sum(leaf.bytes_per_device for leaf in leaves)


def _head(plan: Any) -> Iterator[str]:
    mesh = " x ".join(f"{name} {n:,}" for name, n in plan.mesh_shape.items())
    tiles = [
        ("parameters", f"{plan.parameter_count:,}"),
        ("leaves", f"{len(plan.leaves):,}"),
        ("programs", f"{len(plan.programs):,}"),
        ("in all", _size(plan.total_bytes)),
        ("on a device", _size(plan.bytes_per_device)),
        ("mesh", mesh or "none"),
    ]
    if host := plan.host_bytes_per_device:
        tiles.insert(-1, ("and in its host's memory", _size(host)))
    yield f"<h1>{_esc(plan.name)}</h1>"
    yield f'<div class="soft">fingerprint <code>{_esc(plan.fingerprint)}</code></div>'
    inner = "".join(
        f"<div class=tile><b>{_esc(b)}</b><span>{a}</span></div>" for a, b in tiles
    )
    yield f'<div class="tiles">{inner}</div>'


def _findings(found: Sequence[Any]) -> Iterator[str]:
    yield f"<h2>Findings ({len(found):,})</h2>"
    if not found:
        yield '<p class="soft">Nothing stands out.</p>'
    for one in sorted(found, key=lambda x: x.severity != "warning"):
        shown = ", ".join(f"<code>{_esc(p)}</code>" for p in one.leaves[:3])
        rest = ", ".join(map(_esc, one.leaves[3:200]))
        more = len(one.leaves) - 3
        about = f"<p>{shown}</p>" if shown else ""
        if more > 0:
            about += (
                f"<details><summary>{more:,} more leaves</summary>"
                f'<p class="path">{rest}</p></details>'
            )
        rules = "; ".join(map(_esc, one.rules_as_text))
        yield (
            f'<div class="finding {_esc(one.severity)}"><p><span class="kind">'
            f"{_esc(one.severity)}: {_esc(one.kind)}</span> {_esc(one.reason)}"
            f"{f' ({rules})' if rules else ''}</p>{about}"
            f"<p>→ {_esc(one.remedy)}</p></div>"
        )


def _selected(plan: Any) -> list[PlanLeaf]:
    return [leaf for leaf in plan.leaves if leaf.selected]


def _layouts(plan: Any) -> Iterator[str]:
    groups: dict[Any, list[Any]] = {}
    for leaf in _selected(plan):
        if leaf.sharding is not None:
            groups.setdefault((spec_text(leaf.sharding), len(leaf.shape)), []).append(
                leaf
            )
    if not groups:
        return
    yield f'<h2>Layouts ({len(groups):,})</h2><div class="layouts">'
    order = sorted(groups.items(), key=lambda item: -_held(item[1]))
    for (spec, rank), leaves in order:
        entries = tuple(leaves[0].sharding.spec)
        held = _held(leaves)
        yield (
            f'<div class="layout"><div class="spec">{_esc(spec)}</div>'
            f"<div>{_esc(described(plan.mesh_shape, entries, rank))}</div>"
            f"{layout_svg(plan.mesh_shape, entries, rank)}"
            f"<div>{plural(len(leaves), 'leaf')}, {_size(held)} a device</div>"
            f'<div class="soft path">{", ".join(_folded(leaves, 3))}</div></div>'
        )
    yield "</div>"


def _by_layer(plan: Any) -> Iterator[str]:
    """Bytes a device by layer: the part of a path up to its first number."""
    groups: dict[str, list[int]] = {}
    for leaf in _selected(plan):
        sums = groups.setdefault(_layer(leaf.path), [0, 0, 0])
        sums[0] += 1
        sums[1] += leaf.nbytes
        sums[2] += leaf.bytes_per_device
    alike: dict[Any, list[str]] = {}
    for name, sums in groups.items():
        alike.setdefault((template(name), *sums), []).append(name)
    most = max((key[3] for key in alike), default=1) or 1
    yield '<h2>Bytes by layer</h2><div class="scroll"><table class="layers"><thead><tr>'
    yield "<th>layer</th><th class=n>leaves</th><th class=n>in all</th>"
    yield "<th class=n>a device, each</th><th></th></tr></thead><tbody>"
    for (_, count, total, held), names in alike.items():
        width = 100 * held / most
        yield (
            f'<tr><td class="path">{_esc(folded(names))}</td><td class="n">{count:,}'
            f"{f' &times; {len(names):,}' if len(names) > 1 else ''}</td>"
            f'<td class="n">{_size(total * len(names))}</td>'
            f'<td class="n">{_size(held)}</td><td style="width:30%">'
            f'<span class="bar" style="width:{width:.1f}%"></span></td></tr>'
        )
    yield "</tbody></table></div>"


def _layer(path: str) -> str:
    parts = path.split("/")
    for i, part in enumerate(parts[:-1]):
        if any(c.isdigit() for c in part):
            return "/".join(parts[: i + 1])
    return parts[0] or "(the leaf)"


def _programs(plan: Any) -> Iterator[str]:
    serves: dict[int, list[Any]] = {}
    for leaf in _selected(plan):
        serves.setdefault(leaf.program, []).append(leaf)
    yield f"<h2>Programs ({len(plan.programs):,})</h2>"
    yield '<div class="scroll"><table class="programs"><thead><tr><th class=n>no.</th>'
    yield "<th>leaves that it makes</th><th class=n>leaves</th><th>shape</th>"
    yield "<th class=n>shard</th><th>computed</th></tr></thead><tbody>"
    for number, leaves in sorted(serves.items()):
        shapes = dict.fromkeys("x".join(map(str, x.shape)) or "scalar" for x in leaves)
        hosted = leaves[0].is_hosted
        how = "on the host" if hosted else leaves[0].whole or "its shard alone"
        named = "host" if hosted else str(number)
        sizes = sorted({leaf.bytes_per_device for leaf in leaves})
        yield (
            f'<tr id="program-{named}"><td class="n">{named}</td>'
            f'<td class="path">{", ".join(_folded(leaves))}</td>'
            f'<td class="n" data-name="leaves">{len(leaves):,}</td>'
            f"<td>{_esc(', '.join(list(shapes)[:3]))}</td>"
            f'<td class="n">{_size(sizes[-1])}</td><td>{_esc(how)}</td></tr>'
        )
    yield "</tbody></table></div>"


def _folded(leaves: Iterable[Any], most: int = 6) -> list[str]:
    groups: dict[str, list[str]] = {}
    for leaf in leaves:
        groups.setdefault(template(leaf.path), []).append(leaf.path)
    said = [
        _esc(folded(paths)) or "(the leaf)" for paths in list(groups.values())[:most]
    ]
    more = len(groups) - len(said)
    return said + ([f"{more:,} more"] if more > 0 else [])


def _gains(statistics: Any) -> Iterator[str]:
    chart = [] if statistics is None else statistics.chart()
    if not chart:
        return
    yield '<h2>Gain by depth</h2><p class="soft">Standard deviation times the root of '
    yield "the fan-in, layers from left to right.</p>"
    yield '<div class="scroll"><table class="charts"><tbody>'
    for path, gain, line in chart:
        yield (
            f'<tr><td class="path">{_path(path)}</td><td class="nb">{_esc(gain)}</td>'
            f'<td class="line">{_esc(line)}</td></tr>'
        )
    yield "</tbody></table></div>"


# ---- leaves --------------------------------------------------------------------------


def _leaves(plan: Any, statistics: Any) -> Iterator[str]:
    seen = {} if statistics is None else {x.path: x for x in statistics.leaves}
    groups = alike(plan.leaves)
    yield "<h2>Leaves</h2>"
    yield from _filters(groups)
    head = "".join(f"<th>{name}</th>" for name in (*_COLUMNS, *(_SEEN if seen else ())))
    yield '<div class="scroll"><table class="leaves">'
    yield f"<thead><tr>{head}</tr></thead><tbody>"
    for number, ((_, shape, dtype, spec, program), leaves) in enumerate(groups.items()):
        path, many = folded([x.path for x in leaves]), len(leaves) > 1
        text = " ".join([path, dtype, spec])
        yield (
            f'<tr class="group" data-group="{number}" data-dtype="{_esc(dtype)}" '
            f'data-sharding="{_esc(spec)}" data-program="{program}" '
            f'data-text="{_esc(text.lower())}">'
            f'<td class="path">{_FOLD if many else ""}{_path(path)}'
            f"{_times(len(leaves)) if many else ''}</td>"
            f'<td class="nb">{"x".join(map(str, shape)) or "scalar"}</td>'
            f'<td>{_esc(dtype)}</td><td class="spec">{_esc(spec)}</td>'
            f'<td data-name="program">{"host" if leaves[0].is_hosted else program}</td>'
            f"{_cells(leaves, seen)}</tr>"
        )
        if many:
            yield from _each(number, leaves, seen)
    yield "</tbody></table></div>"


_COLUMNS = ("leaf", "shape", "dtype", "sharding", "program", "on a device")
_SEEN = ("drawn", "mean", "std", "range", "zeros", "histogram")
_FOLD = '<button class="fold" aria-expanded="false" title="each leaf">▸</button>'


def _each(
    number: int, leaves: Sequence[PlanLeaf], seen: dict[str, Any]
) -> Iterator[str]:
    """The hidden rows below that of a group, one for each of its leaves."""
    for leaf in leaves:
        yield (
            f'<tr class="leaf" data-group="{number}" hidden '
            f'data-text="{_esc(leaf.path.lower())}"><td class="path">'
            f"{_path(leaf.path)}</td><td></td><td></td><td></td><td></td>"
            f"{_cells([leaf], seen)}</tr>"
        )


def _times(count: int) -> str:
    return f' <span class="soft">&times; {count:,}</span>'


def _path(path: str) -> str:
    """A path that may break after its slashes."""
    return _esc(path).replace("/", "/<wbr>") or "(the leaf)"


def _filters(groups: Iterable[Any]) -> Iterator[str]:
    found = list(groups)
    yield '<div class="find" hidden><input id="search" type="search" '
    yield 'placeholder="search: kernel bfloat16 layers/3/" aria-label="search leaves">'
    for name, place in (("dtype", 2), ("sharding", 3), ("program", 4)):
        values = dict.fromkeys(str(alike[place]) for alike in found)
        options = "".join(
            f'<option value="{_esc(v)}">{_esc(v)}</option>' for v in values
        )
        yield (
            f'<select name="{name}" aria-label="{name}"><option value="">every {name}'
            f"</option>{options}</select>"
        )
    yield '<span id="count" class="soft"></span></div>'


def _cells(leaves: Sequence[Any], seen: dict[str, Any]) -> str:
    size = _size(_held(leaves))
    cells = f'<td class="n">{size}</td>'
    if not seen:
        return cells
    found = [seen[leaf.path] for leaf in leaves if leaf.path in seen]
    found = [x for x in found if x.windows]
    if not found:
        return cells + "<td>-</td>" * 5 + "<td></td>"
    many = [x.moments for x in found]
    said = {"": found[0].law.short, **_moments(many)}
    cells += "".join(
        f'<td class="nb" data-name="{name}">{_esc(x)}</td>' for name, x in said.items()
    )
    return f"{cells}<td>{_histogram([m.histogram for m in many if m.histogram])}</td>"


def _moments(many: Sequence[Moments]) -> dict[str, str]:
    """The moments of leaves that are alike, together."""
    std = sorted(m.std for m in many)
    alike = std[-1] - std[0] <= 0.02 * std[-1]
    return {
        "mean": f"{sum(m.mean for m in many) / len(many):.2g}",
        "std": f"{std[0]:.3g}" if alike else f"{std[0]:.3g} to {std[-1]:.3g}",
        "range": f"{min(m.min for m in many):.3g} to {max(m.max for m in many):.3g}",
        "zeros": f"{100 * sum(m.zeros for m in many) / len(many):.3g}%",
    }


def _histogram(counts: Sequence[Sequence[int]]) -> str:
    if not counts:
        return ""
    total = [sum(column) for column in zip(*counts, strict=True)]
    most, wide = max(total), 74 / len(total)
    bars = "".join(
        f'<rect x="{i * wide:.1f}" y="{18 - 18 * n / most:.1f}" '
        f'width="{wide - 0.6:.1f}" height="{18 * n / most:.1f}"/>'
        for i, n in enumerate(total)
    )
    return f'<svg class="spark" viewBox="0 0 74 18" role="img">{bars}</svg>'
