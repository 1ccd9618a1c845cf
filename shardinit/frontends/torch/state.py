"""The state of a module: names, what each holds, and the keys of its draws."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

import jax
import torch

from shardinit.core.host_state import watched
from shardinit.core.init_fn import InitFn
from shardinit.core.ir.jaxpr import collector_paused, no_mesh
from shardinit.core.prng.names import check_distinct, key_for_name
from shardinit.errors import InitFnError, UninitializedParameterError
from shardinit.frontends import check_arguments
from shardinit.frontends.torch.graph import Call, Read, Value, topological
from shardinit.frontends.torch.record import recording
from shardinit.frontends.torch.recorder import Recorder
from shardinit.frontends.torch.replay import Replay, Replayer

Keys = Literal["name", "order"]


@dataclass(frozen=True, repr=False)
class TorchInit(InitFn):
    """An `InitFn` of a module of PyTorch, with what the way back has to know.

    Attributes:
      ties: for every further name of a tensor its first, under which it is stored.
      persistent: the names that are in the module's ``state_dict``, ties included.
      buffers: the names of buffers; all others are parameters.
      dtypes: torch's dtype of every stored name, such as ``"int64"``, which is int32
        in JAX unless ``jax_enable_x64`` is set.

    Example:
      >>> import torch
      >>> from shardinit.frontends import torch as frontend
      >>> fn = frontend.init_fn(torch.nn.BatchNorm1d, 8)
      >>> sorted(fn.buffers), fn.dtypes["num_batches_tracked"]
      (['num_batches_tracked', 'running_mean', 'running_var'], 'int64')
    """

    ties: Mapping[str, str] = field(default_factory=dict)
    persistent: frozenset[str] = frozenset()
    buffers: frozenset[str] = frozenset()
    dtypes: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _State:
    """What a module holds."""

    values: dict[str, Value]
    ties: dict[str, str]
    persistent: frozenset[str]
    buffers: frozenset[str]


def init_fn(
    module: torch.nn.Module | Callable[..., torch.nn.Module],
    *args: Any,
    dtype: str | torch.dtype | None = None,
    assume: Literal["zeros"] | None = None,
    keys: Keys = "name",
    **kwargs: Any,
) -> TorchInit:
    """Makes an `InitFn` of a PyTorch module's own initialisation.

    Nothing is allocated: the module is built without memory, whatever device its code
    asks for, and what its code does to the tensors is recorded.

    Args:
      module: a ``torch.nn.Module`` class, or a function that returns a module; or a
        module on the meta device, whose ``reset_parameters`` (or Hugging Face's
        ``initialize_weights``) are called anew.
      *args: positional arguments of the class or function.
      dtype: torch's default dtype while the module is built, such as ``"bfloat16"``.
      assume: ``"zeros"`` for elements that nothing initialises.
      keys: from what a tensor's key derives: its ``"name"``, or its place in the
        ``"order"`` of the module's state, which renaming does not change.
      **kwargs: keyword arguments of the class or function.

    Returns:
      A `TorchInit`, whose function's result is a flat dict from name to array.

    Raises:
      InitFnError: ``module`` is something else or holds memory already, or does not
        take the arguments.
      UninitializedParameterError: (a ``RuntimeError``) nothing initialised a tensor.
      UnsupportedConfigError: (a ``RuntimeError``) an operation cannot be replayed, with
        the name of the parameter and the line of the code.

    Example:
      >>> import shardinit
      >>> import torch
      >>> from shardinit.frontends import torch as frontend
      >>> params = shardinit.init(frontend.init_fn(torch.nn.Linear, 3, 8), 42)
      >>> params["weight"].shape
      (8, 3)
    """
    name = getattr(module, "__name__", type(module).__name__)
    _check(module, name, args, kwargs, assume, keys)
    with watched() as host, _default(dtype_named(dtype)), recording() as recorder:
        built = _built(module, args, kwargs, recorder)
        _initialised(built)
    state = _state(built, recorder)
    if assume is None:
        _refuse_missing(state, name)
    replayer = Replayer()
    with collector_paused(), no_mesh():
        replays = {n: replayer.replay(v, n) for n, v in state.values.items()}
    return TorchInit(
        _function(replays, keys),
        name=type(built).__name__,
        draws_on_host=host.moved,
        asks_process=host.asked,
        again=lambda: init_fn(
            module, *args, dtype=dtype, assume=assume, keys=keys, **kwargs
        ),
        ties=MappingProxyType(state.ties),
        persistent=state.persistent,
        buffers=state.buffers,
        dtypes=MappingProxyType(
            {n: str(v.dtype).removeprefix("torch.") for n, v in state.values.items()}
        ),
    )


def _check(
    module: Any, name: str, args: tuple, kwargs: dict, assume: Any, keys: Any
) -> None:
    """Refuses what is no module on the meta device, and nothing that makes one."""
    where, wanted = "torch.init_fn", "a torch.nn.Module class, or what makes a module"
    if assume not in (None, "zeros"):
        raise InitFnError(where, f"assume is {assume!r}", '"zeros" or None')
    if keys not in ("name", "order"):
        raise InitFnError(where, f"keys is {keys!r}", '"name" or "order"')
    if isinstance(module, torch.nn.Module):
        tensors = [*module.parameters(), *module.buffers()]
        if not all(tensor.is_meta for tensor in tensors):
            remedy = (
                f"torch.init_fn({name}, ...), with the arguments of its constructor, "
                f"or build it in `with torch.device('meta'):`"
            )
            raise InitFnError(where, f"got a {name} that holds memory", wanted, remedy)
        if args or kwargs:
            raise InitFnError(
                where, f"got a {name} that is built, and arguments", wanted
            )
    elif callable(module):
        check_arguments(f"torch.init_fn({name}, ...)", module, args, kwargs)
    else:
        raise InitFnError(where, f"got {name}", wanted)


def dtype_named(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """Torch's dtype of a name.

    Raises:
      InitFnError: there is none of that name.

    Example:
      >>> from shardinit.frontends.torch.state import dtype_named
      >>> dtype_named("bfloat16")
      torch.bfloat16
    """
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype is not None and not isinstance(found, torch.dtype):
        got = f"dtype is {dtype!r}"
        raise InitFnError("torch.init_fn", got, 'a dtype of torch, such as "bfloat16"')
    return found


@contextmanager
def _default(dtype: torch.dtype | None) -> Iterator[None]:
    """Torch's default dtype, in the block."""
    before = torch.get_default_dtype()
    try:
        if dtype is not None:
            torch.set_default_dtype(dtype)
        yield
    finally:
        torch.set_default_dtype(before)


def _built(module: Any, args: tuple, kwargs: dict, recorder: Recorder) -> Any:
    if not isinstance(module, torch.nn.Module):
        built = module(*args, **kwargs)
        if not isinstance(built, torch.nn.Module):
            name = getattr(module, "__name__", type(module).__name__)
            got = f"{name} returned {type(built).__name__}"
            raise InitFnError("torch.init_fn", got, "a torch.nn.Module")
        return built
    for tensor in (*module.parameters(), *module.buffers()):
        recorder.adopt(tensor)
    if _pretrained(module):
        _forget_flags(module)
        return module
    with torch.no_grad():
        module.apply(_reset)
    return module


def _reset(module: Any) -> None:
    for name in ("reset_parameters", "_reset_parameters"):
        if callable(reset := getattr(module, name, None)):
            reset()
            return


def _pretrained(module: Any) -> bool:
    """Whether it is a model of Hugging Face's transformers."""
    known = sys.modules.get("transformers.modeling_utils")
    return known is not None and isinstance(module, known.PreTrainedModel)


def _forget_flags(model: Any) -> None:
    for part in (*model.modules(), *model.parameters(), *model.buffers()):
        part.__dict__.pop("_is_hf_initialized", None)


def _initialised(module: Any) -> None:
    """Initialises models of transformers that were built on the meta device.

    There transformers 5 skips it, and the weights hold what ``nn.Linear`` drew.
    """
    for part in module.modules():
        if _pretrained(part) and not getattr(part, "_is_hf_initialized", False):
            part.initialize_weights()


def _state(module: Any, recorder: Recorder) -> _State:
    """The tensors of a module by name, in torch's order."""
    first: dict[Any, str] = {}
    values: dict[str, Value] = {}
    ties: dict[str, str] = {}
    buffers = dict(module.named_buffers(remove_duplicate=False))
    tensors = {**dict(module.named_parameters(remove_duplicate=False)), **buffers}
    for name, tensor in tensors.items():
        if torch.nn.parameter.is_lazy(tensor):
            raise UninitializedParameterError(
                name,
                "its shape is not known before the first forward pass",
                remedy="Give the layer its sizes instead of using a lazy one",
            )
        owner = first.setdefault(recorder.place_of(tensor), name)
        if owner == name:
            values[name] = recorder.value_of(tensor)
        else:
            ties[name] = owner
    left_out = {
        f"{prefix}.{name}" if prefix else name
        for prefix, part in module.named_modules(remove_duplicate=False)
        for name in part._non_persistent_buffers_set
    }
    return _State(values, ties, frozenset(tensors) - left_out, frozenset(buffers))


def _refuse_missing(state: _State, name: str) -> None:
    for parameter, value in state.values.items():
        for node in topological([value]):
            if isinstance(node, Read) and node.missing:
                file, number = node.line
                at = f"created at {file}:{number}" if file else "of the given module"
                raise UninitializedParameterError(
                    f"{name}: {parameter!r}",
                    f"no operation initialised it, or all of it ({at})",
                    "a value for every element",
                    'Initialise it, or pass assume="zeros"; of a module that is built '
                    "on the meta device, pass what builds it instead",
                )


def _function(replays: dict[str, Replay], keys: Keys) -> Callable[[jax.Array], Any]:
    """The init function: every draw belongs to the first tensor that it enters."""
    names = list(replays)
    check_distinct(names, lambda: names, wide=True)
    owners: dict[Call, tuple[str, int]] = {}
    counts = dict.fromkeys(names, 0)
    for name, replay in replays.items():
        for call in replay.draws:
            if call not in owners:
                owners[call] = name, counts[name]
                counts[name] += 1
    places = {name: number for number, name in enumerate(names)}

    def fn(root: jax.Array) -> dict[str, Any]:
        own: dict[str, jax.Array] = {}

        def key_of(call: Call) -> jax.Array:
            name, number = owners[call]
            if name not in own:
                own[name] = (
                    key_for_name(root, name, wide=True)
                    if keys == "name"
                    else _fold_in(root, places[name])
                )
            return _fold_in(own[name], number) if counts[name] > 1 else own[name]

        return {
            name: replay.run(*map(key_of, replay.draws))
            for name, replay in replays.items()
        }

    return fn


# inlined: the same one equation in a trace, without the checks of its arguments
_fold_in = jax.jit(jax.random.fold_in, inline=True)
