"""Functions as the rooms see them: graphs of which the inputs are given."""

import jax

from shardinit.core.ir import jaxpr as jx
from shardinit.core.ir.builder import Builder
from shardinit.core.ir.graph import Subgraph, Value


def graph_of(fn, *shapes, fold=False):
    """A function's graph; its inputs are arrays of those shapes and dtypes."""
    avals = [jax.ShapeDtypeStruct(*each) for each in shapes]
    inputs = [Value(a.shape, a.dtype) for a in avals]
    closed = jx.closed_from(fn, *avals)
    outs = Builder(folds_keys=fold, keeps_calls=False).read(*jx.opened(closed), inputs)
    return Subgraph(inputs, outs)
