"""What an operation of torch does to memory, by its name and its schema."""

from __future__ import annotations

from typing import Any

# What these leave in their first argument does not depend on what was there.
FILLS = frozenset(
    """zero_ fill_ copy_ normal_ uniform_ random_ exponential_ log_normal_ cauchy_
    geometric_ bernoulli_ trunc_normal_ sparse_""".split()
)
DRAWS = frozenset(
    """normal_ uniform_ random_ exponential_ log_normal_ cauchy_ geometric_ bernoulli_
    trunc_normal_ sparse_ rand randn randint randperm rand_like randn_like randint_like
    normal bernoulli multinomial poisson binomial native_dropout rrelu_with_noise
    normal_functional uniform exponential _standard_gamma _sample_dirichlet""".split()
)
EMPTY = frozenset(
    """empty empty_like empty_strided new_empty new_empty_strided
    empty_permuted""".split()
)
# Views in place: they change the tensor that they are given, and no element.
RESTRIDES = frozenset(
    """t_ transpose_ swapaxes_ swapdims_ squeeze_ unsqueeze_ as_strided_ resize_ set_
    resize_as_ detach_ requires_grad_""".split()
)
# Views whose elements are of another dtype than their storage's: copied instead.
RETYPED = frozenset("view_as_real view_as_complex _conj _neg_view".split())
ASKS = frozenset("_local_scalar_dense equal is_nonzero".split())

_WRITTEN: dict[Any, tuple[Any, ...]] = {}


def written_by(func: Any) -> tuple[Any, ...]:
    """Places of the arguments that an operation writes: numbers, or names of outs."""
    if func not in _WRITTEN:
        found: list[Any] = []
        for number, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                found.append(argument.name if argument.kwarg_only else number)
        _WRITTEN[func] = tuple(found)
    return _WRITTEN[func]
