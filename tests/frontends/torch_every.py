"""Every causal language model of the installed transformers, and the shares that hold.

    python -m tests.frontends.torch_every [SUBSTRING]

prints a line for each class of ``MODEL_FOR_CAUSAL_LM_MAPPING`` that transformers itself
builds after one rule made its default configuration small (``torch_small``), and then
the shares that record, replay and match torch.
"""

import sys
import time
import warnings

import jax
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import shardinit
from shardinit.errors import ShardinitError
from shardinit.frontends import torch as frontend
from tests.frontends.torch_like import faults
from tests.frontends.torch_small import plain, small

LARGEST = 100_000_000  # parameters, up to which values are compared


def kinds():
    """The model types that transformers has a causal language model for."""
    return list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def smaller(kind, auto="AutoModelForCausalLM"):
    """A small configuration, and what builds its model if transformers does."""
    made = getattr(transformers, auto)
    why = ""
    for factor, deep in ((16, 2), (4, 2), (16, 4), (4, 4), (4, 8), (1, 2), (1, 4)):
        try:
            config = small(plain(CONFIG_MAPPING[kind]()), factor, deep)

            def build(config=config):
                return made.from_config(
                    CONFIG_MAPPING[kind].from_dict(config), attn_implementation="eager"
                )

            build()
        except Exception as error:
            why = why or f"{type(error).__name__}: {' '.join(str(error).split())[:100]}"
            continue
        return config, build, ""
    return None, None, why


def tried(kind, auto="AutoModelForCausalLM"):
    """How far one gets: a stage, and what is said there."""
    config, build, why = smaller(kind, auto)
    if config is None:
        return "not built", why
    try:
        fn = frontend.from_config(config, auto=auto)
    except ShardinitError as error:
        return "not recorded", f"{type(error).__name__} {error}"
    try:
        arrays = shardinit.init(fn, 0)
    except ShardinitError as error:
        return "not replayed", str(error)
    if sum(array.size for array in arrays.values()) > LARGEST:
        return "large", ""
    found = faults(fn, arrays, build)
    return ("differs", "; ".join(found)[:600]) if found else ("matches", "")


def main(part=""):
    """Prints every class and the shares; returns how far each got."""
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    stages = {}
    for kind in kinds():
        if part not in kind:
            continue
        start = time.perf_counter()
        try:
            stage, why = tried(kind)
        except Exception as error:
            stage, why = "failed", f"{type(error).__name__}: {error}"[:300]
        jax.clear_caches()
        stages[kind] = stage
        print(
            f"{kind:28} {stage:13} {time.perf_counter() - start:5.1f}s {why}",
            flush=True,
        )
    built = [stage for stage in stages.values() if stage != "not built"]
    recorded = [s for s in built if s not in ("not recorded", "failed")]
    replayed = [s for s in recorded if s != "not replayed"]
    compared = [s for s in replayed if s != "large"]
    matched = [s for s in compared if s == "matches"]
    print(share("recorded", recorded, built))
    print(share("replayed", replayed, built))
    print(share("match", matched, compared))
    return stages


def share(name, part, whole):
    """A line that says how many of how many."""
    percent = len(part) / max(len(whole), 1)
    return f"{name}: {len(part)} of {len(whole)}, {percent:.1%}"


if __name__ == "__main__":
    main(*sys.argv[1:])
