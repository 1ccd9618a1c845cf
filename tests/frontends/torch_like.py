"""Whether arrays are such as a torch module draws: against eight of its own."""

import math

import numpy as np
import torch

from shardinit.frontends.torch.replay import array_of

DRAWN = 8  # real initialisations
FAR = 5  # standard errors
_MANY = 64  # elements from which a standard deviation says something


def state(module):
    """The tensors of a module by their first names, as arrays; and the ties."""
    seen, arrays, ties = {}, {}, {}
    named = [*module.named_parameters(remove_duplicate=False)]
    named += [*module.named_buffers(remove_duplicate=False)]
    for name, tensor in named:
        place = tensor.data_ptr(), tensor.shape, tensor.stride()
        first = seen.setdefault(place if tensor.numel() else name, name)
        if first == name:
            arrays[name] = array_of(tensor.detach())
        else:
            ties[name] = first
    return arrays, ties


def persistent(module):
    return frozenset(module.state_dict())


def faults(fn, arrays, build, drawn=DRAWN):
    """What of a module's own initialisations the arrays are unlike; empty if nothing.

    Args:
      fn: the `TorchInit`.
      arrays: its result.
      build: makes the module for real.
      drawn: how many times.
    """
    states = []
    for seed in range(drawn):
        torch.manual_seed(seed)
        module = build()
        states.append(state(module))
    theirs, ties = states[0]
    found = []
    if set(theirs) != set(arrays) or ties != dict(fn.ties):
        odd = sorted(set(theirs) ^ set(arrays))[:4]
        found.append(f"names {odd} or ties {sorted(set(ties) ^ set(fn.ties))[:4]}")
    if persistent(module) != fn.persistent:
        found.append(f"state_dict {sorted(persistent(module) ^ fn.persistent)[:4]}")
    for name in theirs.keys() & arrays.keys():
        samples = np.stack([s[0][name] for s in states])
        if fn.dtypes[name] != samples.dtype.name:
            found.append(f"{name}: {fn.dtypes[name]} is {samples.dtype}")
        text = unlike(np.asarray(arrays[name]), samples)
        if text:
            found.append(f"{name}: {text}")
    return found


def unlike(ours, samples):
    """How an array differs from arrays that torch drew; empty if it does not."""
    if ours.shape != samples.shape[1:]:
        return f"shape {ours.shape}, not {samples.shape[1:]}"
    if not ours.size:
        return ""
    kind = np.complex128 if samples.dtype.kind == "c" else np.float64
    ours, samples = ours.astype(kind), samples.astype(kind)
    if all(np.array_equal(samples[0], s, equal_nan=True) for s in samples[1:]):
        same = np.allclose(ours, samples[0], rtol=1e-6, atol=1e-8, equal_nan=True)
        return "" if same else "torch has one value, and it is another"
    if kind is np.complex128:
        ours, samples = np.abs(ours), np.abs(samples)
    if not np.isfinite(ours).all():
        return "not finite"
    if np.any(ours[np.all(samples == 0, axis=0)]):
        return "not zero where torch has zeros"
    return _moments(ours, samples)


def _moments(ours, samples):
    count = ours.size
    centre, spread = samples.mean(), samples.std()
    # elements of one leaf may hang together: how far do its means really lie apart?
    apart = samples.reshape(len(samples), -1).mean(1).std(ddof=1)
    error = max(spread / math.sqrt(count), apart) * math.sqrt(1 + 1 / len(samples))
    if abs(ours.mean() - centre) > FAR * error:
        return f"mean {ours.mean():.4g}, torch {centre:.4g} +- {error:.2g}"
    if count < _MANY:
        return ""
    stds = samples.reshape(len(samples), -1).std(1)
    fourth = ((samples - centre) ** 4).mean() / spread**4
    error = max(
        spread * math.sqrt(max(fourth - 1, 0.1) / (4 * count)), stds.std(ddof=1)
    ) * math.sqrt(1 + 1 / len(samples))
    if abs(ours.std() - stds.mean()) > FAR * error:
        return f"std {ours.std():.4g}, torch {stds.mean():.4g} +- {error:.2g}"
    low, high = samples.min() - 1.5 * spread, samples.max() + 1.5 * spread
    if ours.min() < low or ours.max() > high:
        return f"extremes {ours.min():.4g} {ours.max():.4g}, torch {low:.4g} {high:.4g}"
    return ""
