"""PyTorch: a module's own initialisation, recorded and replayed from a key.

Torch fills a module's parameters as it is built, from one generator, in an order that
no other world size has. Here the construction runs without memory and is written down
(``record``): what each parameter is drawn from, and what is done to it. That is
replayed as a function of a key (``replay``), leaf by leaf. The distributions are
torch's, the bits are shardinit's: one set on every mesh.

The result is a flat dict from the module's own names (``named_parameters`` and
``named_buffers``) to arrays. A tensor that has several names is there once, under the
first; `TorchInit.ties` knows the others.

>>> import shardinit, torch
>>> from shardinit.frontends import torch as from_torch
>>> fn = from_torch.init_fn(torch.nn.Linear, 64, 256)
>>> {name: array.shape for name, array in shardinit.init(fn, 0).items()}
{'bias': (256,), 'weight': (256, 64)}
"""

from __future__ import annotations

from shardinit.extras import needs

with needs("torch", "shardinit[torch]"):
    import torch as _torch  # noqa: F401

from shardinit.frontends.torch.back import load_into as load_into
from shardinit.frontends.torch.back import to_torch as to_torch
from shardinit.frontends.torch.hf import from_config as from_config
from shardinit.frontends.torch.rules import (
    placements_from_spec as placements_from_spec,
)
from shardinit.frontends.torch.rules import rules_from_module as rules_from_module
from shardinit.frontends.torch.rules import rules_from_plan as rules_from_plan
from shardinit.frontends.torch.rules import (
    spec_from_placements as spec_from_placements,
)
from shardinit.frontends.torch.state import TorchInit as TorchInit
from shardinit.frontends.torch.state import init_fn as init_fn
