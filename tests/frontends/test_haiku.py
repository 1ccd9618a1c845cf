"""Haiku's own examples: what ``init`` of each gives, sharded.

The models are those of github.com/google-deepmind/dm-haiku/tree/main/examples: the
classifier of mnist.py, the autoencoder of vae.py, the transformer of
transformer/model.py, the ResNet of imagenet/train.py (of fewer blocks) and the LSTM of
haiku_lstms.ipynb.
"""

import dataclasses

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

import shardinit
from shardinit.errors import InitFnError
from shardinit.frontends import haiku as frontend
from tests.core.bits import differing, unlike_jit

KEY = jax.random.key(5)


def shape(*sizes, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(sizes, dtype)


def mnist(images):
    x = images.astype(jnp.float32) / 255.0
    mlp = hk.Sequential(
        [
            hk.Flatten(),
            hk.Linear(300),
            jax.nn.relu,
            hk.Linear(100),
            jax.nn.relu,
            hk.Linear(10),
        ]
    )
    return mlp(x)


@dataclasses.dataclass
class Encoder(hk.Module):
    latent_size: int
    hidden_size: int = 512

    def __call__(self, x):
        x = hk.Flatten()(x)
        x = jax.nn.relu(hk.Linear(self.hidden_size)(x))
        mean = hk.Linear(self.latent_size)(x)
        log_stddev = hk.Linear(self.latent_size)(x)
        return mean, jnp.exp(log_stddev)


@dataclasses.dataclass
class Decoder(hk.Module):
    output_shape: tuple
    hidden_size: int = 512

    def __call__(self, z):
        z = jax.nn.relu(hk.Linear(self.hidden_size)(z))
        logits = hk.Linear(int(np.prod(self.output_shape)))(z)
        return jnp.reshape(logits, (-1, *self.output_shape))


def vae(x):
    x = x.astype(jnp.float32)
    mean, stddev = Encoder(latent_size=10)(x)
    z = mean + stddev * jax.random.normal(hk.next_rng_key(), mean.shape)
    return Decoder(x.shape[1:])(z)


def _layer_norm(x):
    return hk.LayerNorm(axis=-1, create_scale=True, create_offset=True)(x)


@dataclasses.dataclass
class Transformer(hk.Module):
    num_heads: int
    num_layers: int
    attn_size: int
    dropout_rate: float
    widening_factor: int = 4
    name: str | None = None

    def __call__(self, embeddings, mask):
        initializer = hk.initializers.VarianceScaling(2 / self.num_layers)
        _, seq_len, model_size = embeddings.shape
        causal_mask = np.tril(np.ones((1, 1, seq_len, seq_len)))
        mask = mask[:, None, None, :] * causal_mask
        h = embeddings
        for _ in range(self.num_layers):
            attn_block = hk.MultiHeadAttention(
                num_heads=self.num_heads,
                key_size=self.attn_size,
                model_size=model_size,
                w_init=initializer,
            )
            h_norm = _layer_norm(h)
            h_attn = attn_block(h_norm, h_norm, h_norm, mask=mask)
            h = h + hk.dropout(hk.next_rng_key(), self.dropout_rate, h_attn)
            dense_block = hk.Sequential(
                [
                    hk.Linear(self.widening_factor * model_size, w_init=initializer),
                    jax.nn.gelu,
                    hk.Linear(model_size, w_init=initializer),
                ]
            )
            h_dense = dense_block(_layer_norm(h))
            h = h + hk.dropout(hk.next_rng_key(), self.dropout_rate, h_dense)
        return _layer_norm(h)


@dataclasses.dataclass
class LanguageModel(hk.Module):
    transformer: Transformer
    model_size: int
    vocab_size: int
    pad_token: int
    name: str | None = None

    def __call__(self, tokens):
        input_mask = jnp.greater(tokens, self.pad_token)
        _, seq_len = tokens.shape
        embed_init = hk.initializers.TruncatedNormal(stddev=0.02)
        token_embedding_map = hk.Embed(
            self.vocab_size, embed_dim=self.model_size, w_init=embed_init
        )
        positional_embeddings = hk.get_parameter(
            "positional_embeddings", [seq_len, self.model_size], init=embed_init
        )
        input_embeddings = token_embedding_map(tokens) + positional_embeddings
        embeddings = self.transformer(input_embeddings, input_mask)
        return hk.Linear(self.vocab_size)(embeddings)


def language_model(tokens, layers=3):
    transformer = Transformer(
        num_heads=4, num_layers=layers, attn_size=32, dropout_rate=0.1
    )
    return LanguageModel(transformer, model_size=128, vocab_size=256, pad_token=0)(
        tokens
    )


def resnet(images, is_training):
    model = hk.nets.ResNet(
        blocks_per_group=(1, 1, 1, 1),
        num_classes=100,
        bn_config={"decay_rate": 0.9},
        resnet_v2=True,
        bottleneck=False,
        channels_per_group=(64, 64, 128, 128),
        use_projection=(True, True, True, True),
    )
    return model(images, is_training=is_training)


def lstm(seqs):
    core = hk.LSTM(32)
    batch_size = seqs.shape[1]
    outs, _ = hk.dynamic_unroll(core, seqs, core.initial_state(batch_size))
    return hk.BatchApply(hk.Linear(1))(outs)


EXAMPLES = {
    "mnist": (hk.transform(mnist), (shape(8, 28, 28, 1, dtype=jnp.uint8),)),
    "vae": (hk.transform(vae), (shape(8, 28, 28, 1),)),
    "transformer": (hk.transform(language_model), (shape(2, 32, dtype=jnp.int32),)),
    "resnet": (hk.transform_with_state(resnet), (jnp.zeros((1, 16, 16, 3)), True)),
    "lstm": (
        hk.without_apply_rng(hk.transform(lstm)),
        (shape(16, 4, 1),),
    ),
}


def zeros(inputs):  # a batch norm's averages start from those of the batch
    return [
        jnp.zeros(x.shape, x.dtype) if isinstance(x, jax.ShapeDtypeStruct) else x
        for x in inputs
    ]


@pytest.mark.slow
@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_ends_sharded_as_its_init_makes_it(name, mesh):
    transformed, inputs = EXAMPLES[name]
    plan = shardinit.plan(
        frontend.init_fn(transformed, *inputs),
        mesh=mesh,
        rules=shardinit.fsdp("model", min_bytes=4096),
        indivisible="next",
    )
    got = shardinit.compile_plan(plan)(KEY)
    want = jax.jit(lambda key: transformed.init(key, *zeros(inputs)))(KEY)
    assert jax.tree.structure(got) == jax.tree.structure(want)
    assert unlike_jit(got, want) == []
    for leaf, array in zip(plan.leaves, jax.tree.leaves(got), strict=True):
        assert array.sharding.is_equivalent_to(leaf.sharding, array.ndim)
    assert plan.bytes_per_device < plan.total_bytes / 3


@pytest.mark.slow
def test_modules_lie_by_rules_on_their_paths(mesh):
    rules = shardinit.PathRules(
        [
            (r"linear(_\d+)?/w", PartitionSpec("data", "model")),
            ("embed/embeddings", PartitionSpec("model", "data")),
            ("", PartitionSpec()),
        ]
    )
    transformed, inputs = EXAMPLES["transformer"]
    init = frontend.init_fn(transformed, *inputs)
    params = shardinit.init(init, KEY, mesh=mesh, rules=rules)
    table = params["language_model/embed"]["embeddings"]
    up = params["transformer/linear"]["w"]
    assert table.addressable_shards[0].data.shape == (64, 64)
    assert up.addressable_shards[0].data.shape == (64, 128)


@pytest.mark.slow
def test_depth_adds_no_program():
    def programs(layers):
        net = hk.transform(lambda tokens: language_model(tokens, layers))
        init = frontend.init_fn(net, shape(2, 32, dtype=jnp.int32))
        return len(shardinit.plan(init).programs)

    assert programs(2) == programs(6)


@pytest.mark.slow
def test_the_sharded_parameters_are_applied(mesh):
    transformed, inputs = EXAMPLES["resnet"]
    init = frontend.init_fn(transformed, *inputs)
    params, state = shardinit.init(init, 0, mesh=auto(mesh))
    image, training = zeros(inputs)
    logits, state = jax.jit(transformed.apply, static_argnums=4)(
        params, state, KEY, image, training
    )
    assert logits.shape == (1, 100)


def auto(mesh):
    return jax.sharding.Mesh(mesh.devices, mesh.axis_names)


@pytest.mark.slow
def test_several_functions_of_one_transform():
    def both():
        encoder, decoder = Encoder(latent_size=10), Decoder((4, 4))

        def init(x):
            return decoder(encoder(x)[0])

        return init, (encoder, decoder)

    net = hk.multi_transform(both)
    got = shardinit.init(frontend.init_fn(net, shape(1, 16)), KEY)
    want = jax.jit(net.init)(KEY, jnp.zeros((1, 16)))
    assert jax.tree.structure(got) == jax.tree.structure(want)
    assert unlike_jit(got, want) == []


def normalised(x):
    mean = hk.get_parameter("mean", x.shape[1:], init=lambda *_: x.mean(0))
    return hk.Linear(64)(x - mean)


def test_an_input_that_a_parameter_is_computed_from():
    net = hk.transform(normalised)
    with pytest.raises(InitFnError, match=r"mean.* depends on the values of an input"):
        frontend.init_fn(net, shape(4, 32))
    x = jax.random.normal(jax.random.key(1), (4, 32))
    got = shardinit.init(frontend.init_fn(net, x), KEY)
    assert differing(got, jax.jit(lambda key: net.init(key, x))(KEY)) == []


@pytest.mark.slow
def test_what_is_missing_of_the_parameters_is_made(mesh):
    init = frontend.init_fn(EXAMPLES["vae"][0], *EXAMPLES["vae"][1])
    whole = shardinit.init(init, KEY, mesh=mesh)
    part = {name: whole[name] for name in whole if name.startswith("encoder")}
    got = shardinit.init_missing(part, init, KEY, mesh=mesh)
    assert got["encoder/linear"]["w"] is whole["encoder/linear"]["w"]
    assert differing(got, whole) == []
