"""Orthogonal matrices of which no device ever holds more than a block.

The stock orthogonal initializer takes the QR of a random matrix: a device needs all of
it for any part. Stewart's method needs none. A random orthogonal matrix is a product of
Householder reflections along independent Gaussian vectors, the k-th in the last n - k
coordinates (G. W. Stewart, "The efficient generation of random orthogonal matrices",
SIAM J. Numer. Anal. 17, 1980). So some rows of it are some rows of the identity, sent
through all reflections; and each vector is drawn when it is needed, from the key and
its number, by whoever needs it. No device talks to another.

Rows go in tiles, as one ``lax.map``, which shardinit windows by the step, so a device
makes the tiles that its shard touches. Reflections go in blocks in the compact form
I - V T V' with T the inverse of a triangle of V'V (C. Puglisi, "Modification of the
Householder method based on the compact WY representation", SIAM J. Sci. Stat. Comput.
13, 1992), so that the work is matrix products. Unlike the Gram matrix of the random
matrix itself, this triangle is well conditioned: square matrices are as orthogonal as
tall ones.

The distribution is that of ``jax.nn.initializers.orthogonal`` (Haar), the values are
others. A leaf with sides n >= m costs about 4 n n m multiplications and additions,
divided by the ways that its longer side is sharded; sharding the shorter side saves
memory and no work. Where n > 16 m all reflections are one block, whose triangle each
tile computes anew: 4 n m m for each of the tiles that a device touches, 64 at most.

>>> import jax, shardinit
>>> init = shardinit.initializers.orthogonal()
>>> init(jax.random.key(0), (64, 64)).shape
(64, 64)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

LARGEST_BLOCK = 128  # rows that are made, or reflections that are applied, together
SHARE = 64  # a block is at most one in so many of the columns, if 8 or more
THIN = 16  # from so many times as long as wide on, the triangle of all columns is small
TILES = 64  # of a thin matrix

Initializer = Callable[..., jax.Array]


def orthogonal(
    scale: float = 1.0, column_axis: int = -1, dtype: Any = jnp.float32
) -> Initializer:
    """Orthogonal matrices, sharded; takes the arguments of the stock initializer.

    Args:
      scale: what every singular value is.
      column_axis: the axis that counts as columns; all others together are rows.
      dtype: default dtype of what is made; float32 is what it is computed in, float64
        for float64.

    Returns:
      ``init(key, shape, dtype=dtype)``. With columns not more than rows the columns are
      orthonormal (times ``scale``), otherwise the rows are, to 1e-5 in float32.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from shardinit.initializers import orthogonal
      >>> matrix = orthogonal()(jax.random.key(42), (8, 4))
      >>> bool(jnp.allclose(matrix.T @ matrix, jnp.eye(4), atol=1e-5))
      True
    """

    def init(
        key: Any, shape: Sequence[int], dtype: Any = dtype, out_sharding: Any = None
    ) -> jax.Array:
        _refuse(out_sharding)
        shape = tuple(shape)
        if len(shape) < 2:
            raise ValueError(
                f"orthogonal: got shape {shape}; expected two axes or more"
            )
        columns = shape[column_axis]
        rows = math.prod(shape) // columns if columns else 0
        if 0 in shape:
            return jnp.zeros(shape, dtype)
        tall = semi_orthogonal(
            key, max(rows, columns), min(rows, columns), scale, dtype
        )
        others = [n for i, n in enumerate(shape) if i != column_axis % len(shape)]
        if columns > rows:
            matrix = lax.reshape(tall, (columns, *others))
            return jnp.moveaxis(matrix, 0, column_axis)
        return jnp.moveaxis(lax.reshape(tall, (*others, columns)), -1, column_axis)

    return init


def delta_orthogonal(
    scale: float = 1.0, column_axis: int = -1, dtype: Any = jnp.float32
) -> Initializer:
    """Convolution kernels that are orthogonal at their centre and zero elsewhere.

    As ``jax.nn.initializers.delta_orthogonal`` (L. Xiao and others, "Dynamical isometry
    and a mean field theory of CNNs", ICML 2018), sharded.

    Args:
      scale: what every singular value of the centre is.
      column_axis: the axis that counts as columns at the centre; the last one.
      dtype: default dtype.

    Returns:
      ``init(key, shape, dtype=dtype)`` for shapes of three to five axes, the last two
      being inputs and not fewer outputs.

    Example:
      >>> import jax
      >>> from shardinit.initializers import delta_orthogonal
      >>> kernel = delta_orthogonal()(jax.random.key(42), (3, 4, 8))
      >>> bool((kernel[0] == 0).all()), bool((kernel[1] == 0).all())
      (True, False)
    """

    def init(
        key: Any, shape: Sequence[int], dtype: Any = dtype, out_sharding: Any = None
    ) -> jax.Array:
        _refuse(out_sharding)
        shape = tuple(shape)
        if len(shape) not in (3, 4, 5):
            raise ValueError(
                f"delta_orthogonal: got shape {shape}; expected three to five axes"
            )
        if shape[-1] < shape[-2]:
            raise ValueError(
                f"delta_orthogonal: got shape {shape}; expected as many outputs (the "
                f"last axis) as inputs, or more"
            )
        centre = orthogonal(scale, column_axis, dtype)(key, shape[-2:], dtype)
        around = [((n - 1) // 2, n - 1 - (n - 1) // 2, 0) for n in shape[:-2]]
        kernel = centre.reshape((*[1] * len(around), *shape[-2:]))
        return lax.pad(kernel, np.zeros((), dtype), [*around, (0, 0, 0), (0, 0, 0)])

    return init


def _refuse(out_sharding: Any) -> None:
    if out_sharding is not None:
        raise ValueError(
            "out_sharding: shardinit places a leaf by its plan; give rules or "
            "out_shardings to shardinit.init or shardinit.plan"
        )


def semi_orthogonal(key: Any, rows: int, columns: int, scale: float, dtype: Any) -> Any:
    """The first columns of a random orthogonal matrix.

    Args:
      key: a key.
      rows: its size.
      columns: how many of its columns, at most ``rows``.
      scale: factor of the result.
      dtype: of the result.

    Returns:
      An array (rows, columns) of ``dtype``, made in float32 or float64.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from shardinit.initializers import semi_orthogonal
      >>> semi_orthogonal(jax.random.key(42), 8, 4, 1.0, jnp.float32).shape
      (8, 4)
    """
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"orthogonal: got dtype {dtype}; expected a real floating one")
    exact = jnp.float64 if jnp.dtype(dtype) == jnp.float64 else jnp.float32
    if rows > THIN * columns:
        tile, make = -(-rows // TILES), _thin_rows
    else:
        tile, make = min(_block(columns), rows), _rows

    def rows_of(number: Any) -> Any:
        made = make(key, number, tile, rows, columns, exact)
        return (made * jnp.asarray(scale, exact)).astype(dtype)

    tiles = lax.map(rows_of, np.arange(-(-rows // tile), dtype=np.int32))
    return lax.slice_in_dim(tiles.reshape(-1, columns), 0, rows)


def _block(columns: int) -> int:
    """A power of two that is a small part of the columns, and 8 at least."""
    return max(8, min(LARGEST_BLOCK, 1 << (columns // SHARE).bit_length() >> 1))


def _rows(key: Any, tile: Any, count: int, size: int, columns: int, dtype: Any) -> Any:
    """One tile of rows of the first columns of a random orthogonal matrix.

    Args:
      key: a key.
      tile: which tile, int32.
      count: rows of a tile.
      size: of the orthogonal matrix.
      columns: how many of them.
      dtype: of the result.
    """
    block = min(_block(columns), columns)
    blocks = -(-columns // block)
    row = lax.broadcasted_iota(np.int32, (size, block), 0)

    def apply(number: Any, state: Any) -> Any:
        held, signs = state
        column = number * block + lax.broadcasted_iota(np.int32, (size, block), 1)
        drawn = jax.random.normal(jax.random.fold_in(key, number), row.shape, dtype)
        drawn = jnp.where((row >= column) & (column < columns), drawn, 0)
        leading = jnp.where(row == column, drawn, 0)
        sign, shift, length = _reflections(
            jnp.sum(drawn * drawn, axis=0), jnp.sum(leading, axis=0)
        )
        vectors = jnp.where(row == column, drawn + shift, drawn) / length
        inner = _solved(_product(vectors, vectors, 0, 0), _product(held, vectors, 1, 0))
        held = held - _product(inner, vectors, 1, 1)
        return held, lax.dynamic_update_slice(signs, -sign, (number * block,))

    held = _unit_rows(tile * count, count, size, dtype)
    signs = jnp.zeros(blocks * block, dtype)
    held, signs = lax.fori_loop(0, blocks, apply, (held, signs))
    return held[:, :columns] * signs[None, :columns]


def _thin_rows(
    key: Any, tile: Any, count: int, size: int, columns: int, dtype: Any
) -> Any:
    """As ``_rows``, with all reflections as one block that is drawn tile by tile."""

    def drawn(number: Any) -> tuple[Any, Any]:
        """A tile of the random vectors, and where in it their leading places are."""
        row = number * count + lax.broadcasted_iota(np.int32, (count, columns), 0)
        column = lax.broadcasted_iota(np.int32, (count, columns), 1)
        made = jax.random.normal(jax.random.fold_in(key, number), row.shape, dtype)
        return jnp.where((row >= column) & (row < size), made, 0), row == column

    def add(number: Any, state: Any) -> Any:
        gram, top = state
        made, _ = drawn(number)
        # The first rows of all, one tile after the other; what lies beyond is cut.
        upper = lax.dynamic_update_slice(top, made, (number * count, 0))
        top = jnp.where(number * count < columns, upper, top)
        return gram + _product(made, made, 0, 0), top

    padded = -(-columns // count) * count
    empty = jnp.zeros((columns, columns), dtype), jnp.zeros((padded, columns), dtype)
    gram, top = lax.fori_loop(0, -(-size // count), add, empty)
    top = top[:columns]
    sign, shift, length = _reflections(jnp.diagonal(gram), jnp.diagonal(top))
    # The vectors are V = X + E S with E the unit vectors and S the diagonal of shifts.
    cross = top * shift[:, None]
    gram = (gram + cross + cross.T + jnp.diag(shift * shift)) / length / length[:, None]
    vectors = (top + jnp.diag(shift)) / length
    mine, leads = drawn(tile)
    mine = jnp.where(leads, mine + shift, mine) / length
    held = _unit_rows(tile * count, count, columns, dtype)
    return (held - _product(_solved(gram, mine), vectors, 1, 1)) * -sign


def _reflections(squares: Any, leading: Any) -> tuple[Any, Any, Any]:
    """Reflections that send random vectors to multiples of the unit vectors.

    Args:
      squares: sum of squares of each vector.
      leading: the first coordinate of each that is not zero by construction.

    Returns:
      The sign of the leading coordinate, what is added to it, and the length of the
      vector then; 1 for a vector of zeros, whose reflection is the identity.
    """
    sign = jnp.where(leading < 0, -1, 1).astype(squares.dtype)
    norm = jnp.sqrt(squares)
    length = jnp.sqrt(2 * norm * (norm + jnp.abs(leading)))
    return sign, sign * norm, jnp.where(length > 0, length, 1)


def _solved(gram: Any, right: Any) -> Any:
    """``right`` times T, the inverse of the triangle of V'V with halves of ones."""
    middle = jnp.triu(gram, 1) + jnp.eye(len(gram), dtype=gram.dtype) / 2
    return lax.linalg.triangular_solve(middle, right, left_side=False, lower=False)


def _unit_rows(first: Any, count: int, columns: int, dtype: Any) -> Any:
    row = first + lax.broadcasted_iota(np.int32, (count, columns), 0)
    return (row == lax.broadcasted_iota(np.int32, row.shape, 1)).astype(dtype)


def _product(left: Any, right: Any, left_axis: int, right_axis: int) -> Any:
    """Contracts one axis of each, in full precision on every platform."""
    return lax.dot_general(
        left,
        right,
        (((left_axis,), (right_axis,)), ((), ())),
        precision=lax.Precision.HIGHEST,
    )
