"""Restored trees under a model's own paths: mapped, stacked, repeated, padded."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import shardinit
from shardinit.core.run import mapped
from shardinit.errors import (
    InitFnError,
    SelectError,
    ShardingError,
    StructureMismatchError,
)

from .bits import differing

pytestmark = pytest.mark.once

RULES = shardinit.fsdp("data", min_bytes=0)


def numbers(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def unscanned(layers):
    return {
        f"layers_{i}": {"up": numbers(16, 24, seed=i), "norm": numbers(16, seed=50 + i)}
        for i in range(layers)
    }


def model_of(tree):
    """An init function of a tree's shapes."""
    leaves, structure = jax.tree.flatten(tree)

    def init(key):
        keys = jax.random.split(key, len(leaves))
        drawn = [
            jax.random.normal(k, x.shape, x.dtype)
            for k, x in zip(keys, leaves, strict=True)
        ]
        return jax.tree.unflatten(structure, drawn)

    return init


def test_sixteen_layers_go_into_a_model_of_twenty_four(mesh):
    there = unscanned(16)
    init = model_of(unscanned(24))
    plan = shardinit.plan_missing(
        there,
        init,
        mesh=mesh,
        rules=RULES,
        paths={"layers_{i}/**": "layers_{i+4}/**"},
    )
    account = plan.account.as_data()
    assert account["mapped"]["leaves"] == 32
    assert account["kept"]["leaves"] == 0
    assert account["filled"]["leaves"] == 16
    assert "layers_10/norm from layers_6/norm" in str(plan)
    got = plan(1)
    assert (
        differing(
            [got[f"layers_{i + 4}"] for i in range(16)],
            [there[f"layers_{i}"] for i in range(16)],
        )
        == []
    )
    want = shardinit.init(init, 1, mesh=mesh, rules=RULES)
    for i in (0, 3, 20, 23):
        assert differing(got[f"layers_{i}"], want[f"layers_{i}"]) == []


def test_a_leaf_of_another_path_alone_is_the_same_object(mesh):
    old = {"body": {"w": jnp.ones((8, 32))}, "keys": jax.random.key(3)}
    init = model_of({"trunk": {"w": old["body"]["w"]}})
    got = shardinit.init_missing(
        old,
        lambda key: {**init(key), "rng": jax.random.key(0)},
        0,
        paths="body/** -> trunk/**\nkeys -> rng",
    )
    assert got["trunk"]["w"] is old["body"]["w"]
    assert got["rng"] is old["keys"]


def test_layers_are_stacked_and_unstacked_along_any_axis(mesh):
    apart = unscanned(4)
    for axis in (0, 1):
        together = {
            name: np.stack([apart[f"layers_{i}"][name] for i in range(4)], axis)
            for name in ("up", "norm")
        }
        scanned = {"layers": together}
        for there, wanted, line in (
            (apart, scanned, f"layers_{{i}}/* -> layers/* : stack {axis}"),
            (scanned, apart, f"layers/* -> layers_{{i}}/* : unstack {axis}"),
        ):
            placed = shardinit.init(model_of(there), 0, mesh=mesh, rules=RULES)
            placed = jax.tree.map(
                lambda x, to: jax.device_put(x, to.sharding), there, placed
            )
            for source in (there, placed)[axis:]:
                got = shardinit.init_missing(
                    source, model_of(wanted), 0, mesh=mesh, rules=RULES, paths=[line]
                )
                assert differing(got, wanted) == []
                assert all(not x.is_fully_replicated for x in jax.tree.leaves(got))


def test_a_dense_mlp_becomes_each_expert_with_noise(mesh):
    there = {"layers": {"mlp": {"up": numbers(3, 16, 32)}, "norm": numbers(3, 16)}}
    experts = jnp.zeros((3, 8, 16, 32))
    wanted = {"layers": {"experts": {"up": experts}, "norm": jnp.zeros((3, 16))}}
    line = "layers/mlp/* -> layers/experts/* : repeat 8, stack 1"
    options = {"mesh": mesh, "rules": RULES}
    init = model_of(wanted)
    plain = shardinit.init_missing(there, init, 7, paths=line, **options)
    copies = np.repeat(there["layers"]["mlp"]["up"][:, None], 8, 1)
    assert differing(plain["layers"]["experts"]["up"], copies) == []
    noisy = f"{line}, noise 0.01"
    plan = shardinit.plan_missing(there, init, paths=noisy, **options)
    assert "from layers/mlp/up with noise 0.01" in str(plan.account)
    got = plan(7)["layers"]["experts"]["up"]
    noise = np.asarray(got) - copies
    assert 0.0095 < noise.std() < 0.0105
    assert abs(noise.mean()) < 1e-3
    assert len({x.tobytes() for x in np.asarray(got)[0]}) == 8
    assert differing(plan(7)["layers"]["experts"]["up"], got) == []
    alone = shardinit.init_missing(there, init, 7, paths=noisy)
    assert differing(alone["layers"]["experts"]["up"], got) == []
    other = shardinit.init_missing(there, init, 8, paths=noisy, **options)
    assert differing(other["layers"]["experts"]["up"], got) != []


def test_experts_apart_transposed_split_fused_and_cast(mesh):
    there = {
        "mlp": {"up": numbers(16, 32)},
        "qkv": numbers(16, 96, seed=1),
        "gate": numbers(16, 32, seed=2),
        "value": numbers(16, 32, seed=3),
    }
    wanted = {
        "experts": {str(i): {"up": jnp.zeros((32, 16))} for i in range(2)},
        "q": jnp.zeros((16, 32)),
        "k": jnp.zeros((16, 32)),
        "v": jnp.zeros((16, 32)),
        "gated": jnp.zeros((16, 80), jnp.bfloat16),
        "mlp": {"up": jnp.zeros((16, 32))},
    }
    lines = """
    mlp/up -> experts/{e}/up : repeat 2, transpose, copy   # and stays where it is
    qkv    -> q, k, v        : split 1
    gate   -> gated          : fuse 1
    value  -> gated          : fuse 1
    """
    plan = shardinit.plan_missing(
        there, model_of(wanted), mesh=mesh, rules=RULES, paths=lines, cast="gated",
        grow={"gated": "zeros"},
    )  # fmt: skip
    got = plan(0)
    up = there["mlp"]["up"]
    assert differing([x["up"] for x in got["experts"].values()], [up.T, up.T]) == []
    assert differing([got[x] for x in "qkv"], np.split(there["qkv"], 3, 1)) == []
    both = np.concatenate([there["gate"], there["value"]], 1)
    assert differing(np.asarray(got["gated"])[:, :64], jnp.bfloat16(both)) == []
    assert (np.asarray(got["gated"])[:, 64:] == 0).all()
    assert differing(got["mlp"]["up"], up) == []
    account = plan.account.as_data()
    assert account["kept"]["paths"] == ["mlp/up"]
    assert account["cast"]["paths"] == account["grown"]["paths"] == ["gated"]
    assert "gated from gate and 1 more" in str(plan.account)


def test_no_more_of_a_leaf_is_read_than_a_device_holds(mesh, monkeypatch):
    there, read = {f"layers_{i}": numbers(64, 32) for i in range(8)}, []
    plain = mapped._of_shards

    def watched(path, array, region):
        read.append(region.size)
        return plain(path, array, region)

    monkeypatch.setattr(mapped, "_of_shards", watched)
    there = jax.tree.map(jnp.asarray, there)
    wanted = {"layers": jnp.zeros((8, 64, 32))}
    shardinit.init_missing(
        there, model_of(wanted), 0, mesh=mesh, rules=RULES,
        paths="layers_* -> layers : stack",
    )  # fmt: skip
    shard = 8 * 64 * 32 // mesh.shape["data"]
    assert max(read) <= shard
    assert sum(read) == mesh.size * shard


def test_what_a_mapping_cannot_do_is_refused():
    init = model_of({"a": jnp.zeros((4, 8)), "b": jnp.zeros((4, 8))})
    there = {"a": numbers(4, 8), "c": numbers(4, 8), "n": np.ones((4, 8), np.int32)}

    def refused(error, match, paths, **given):
        with pytest.raises(error, match=match):
            shardinit.init_missing({**there, **given}, init, 0, paths=paths)

    refused(SelectError, "makes 'a', which is there itself", "c -> a")
    refused(SelectError, "it renames no leaf", {"z": "b"})
    refused(SelectError, "got 'turn'", "c -> b : turn")
    refused(SelectError, r"paths='.*none.txt'.*cannot be read", "none.txt")
    refused(StructureMismatchError, "'n'.*not among", "c -> b")
    mixed = "c -> b : fuse\nn -> b : fuse"
    refused(StructureMismatchError, "leaves of one dtype", mixed)
    refused(StructureMismatchError, r"\(8, 4\)", "c -> b : transpose", n=...)
    refused(StructureMismatchError, "'c': got str", "c -> b", c="text", n=...)
    whole = {"n": numbers(4).astype(np.int32)}
    with pytest.raises(StructureMismatchError, match="noise for int32"):
        shardinit.plan_missing(
            whole, lambda key: {"m": jnp.zeros(4, jnp.int32)}, paths="n -> m : noise 1"
        )
    refused(SelectError, "it adds to", "{x} -> {x+1}", n=...)
    keys = jax.random.split(jax.random.key(0), 4)
    refused(StructureMismatchError, "only change", "c -> b : repeat 2", c=keys, n=...)


@pytest.mark.parametrize("store", ["safetensors", "orbax"])
def test_a_folder_is_restored_by_a_mapping(mesh, tmp_path, store):
    there = {**unscanned(2), "mlp": numbers(8, 32), "embed": numbers(16, 32, seed=3)}
    there = jax.tree.map(jnp.asarray, there)
    if store == "orbax":
        shardinit.storage.orbax.save(tmp_path / "made", there)
        restore = shardinit.storage.orbax.restore
    else:
        shardinit.storage.safetensors.write(tmp_path / "made", there)
        restore = shardinit.storage.safetensors.restore
    layers = {
        name: np.stack([there[f"layers_{i}"][name] for i in range(2)])
        for name in ("up", "norm")
    }
    wanted = {
        "layers": layers,
        "experts": np.stack([there["mlp"]] * 2),
        "tokens": there["embed"],
        "head": jnp.zeros((32, 16)),
    }
    plan = shardinit.plan(model_of(wanted), mesh=mesh, rules=RULES)
    lines = tmp_path / "lines.txt"
    lines.write_text(
        """
        layers_*/{x} -> layers/{x} : stack
        mlp -> experts : repeat 2
        embed -> tokens
        """
    )
    got = restore(tmp_path / "made", plan, key=5, paths=lines)
    head = shardinit.compile_plan(plan)(5)["head"]
    assert differing(got, {**wanted, "head": np.asarray(head)}) == []
    assert [x.sharding for x in jax.tree.leaves(got)] == [
        x.sharding for x in plan.leaves
    ]


def vocabulary(key, rows=57):
    embed, head = jax.random.split(key)
    return {
        "embed": jax.random.normal(embed, (rows, 32)),
        "head": jax.random.normal(head, (32, rows)),
    }


PAD = {"embed": 8, "head": (None, 8)}


def test_a_vocabulary_is_padded_so_that_it_shards(mesh):
    rules = shardinit.PathRules(
        [("embed", jax.P(("data", "model"))), ("head", jax.P(None, ("data", "model")))]
    )
    with pytest.raises(ShardingError, match="57"):
        shardinit.plan(vocabulary, mesh=mesh, rules=rules)
    plan = shardinit.plan(shardinit.padded(vocabulary, PAD), mesh=mesh, rules=rules)
    assert [x.shape for x in plan.leaves] == [(64, 32), (32, 64)]
    assert plan.whole_leaves == ()
    got, want = shardinit.compile_plan(plan)(3), shardinit.init(vocabulary, 3)
    assert differing(np.asarray(got["embed"])[:57], want["embed"]) == []
    assert differing(np.asarray(got["head"])[:, :57], want["head"]) == []
    assert not np.asarray(got["embed"])[57:].any()
    assert not np.asarray(got["head"])[:, 57:].any()
    assert got["embed"].addressable_shards[0].data.shape == (8, 32)


def test_a_restored_vocabulary_is_padded_by_its_policy(mesh):
    there = {"embed": numbers(57, 32)}
    options = {"mesh": mesh, "rules": RULES, "pad": PAD}
    got = shardinit.init_missing(there, vocabulary, 0, **options)
    assert differing(np.asarray(got["embed"])[:57], there["embed"]) == []
    assert not np.asarray(got["embed"])[57:].any()
    assert got["head"].shape == (32, 64)
    got = shardinit.init_missing(
        there, vocabulary, 0, grow={"embed": "copy"}, **options
    )
    assert differing(np.asarray(got["embed"])[57:], there["embed"][:7]) == []
    same = {"embed": numbers(64, 32)}
    assert shardinit.init_missing(same, vocabulary, 0, pad=PAD, grow="head")[
        "embed"
    ].shape == (64, 32)


def test_what_cannot_be_padded_is_refused():
    program = shardinit.export_plan(vocabulary)
    with pytest.raises(InitFnError, match="its shapes are settled"):
        shardinit.padded(program, PAD)
    wrong: list[Any] = [{"embed": 0}, {"embed": (8, "x")}]
    for pad in wrong:
        with pytest.raises(ShardingError, match="positive integer"):
            shardinit.padded(vocabulary, pad)
    with pytest.raises(ShardingError, match="at most its 2 axes"):
        shardinit.plan(shardinit.padded(vocabulary, {"embed": (8, 8, 8)}))
    with pytest.raises(SelectError, match="matches no leaf"):
        shardinit.plan(shardinit.padded(vocabulary, {"embedding": 8}))
