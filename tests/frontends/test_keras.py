"""Keras's own examples: all variables from one key, sharded, and the model that runs.

The models are those of keras.io/examples: "Simple MNIST convnet", "Text classification
with Transformer", "Bidirectional LSTM on IMDB", "Variational AutoEncoder" and "Image
classification with Vision Transformer".
"""

import os
import random
import subprocess
import sys

import jax
import jax.numpy as jnp
import keras
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from keras import layers, ops

import shardinit
from shardinit.errors import DuplicateNamesError, InitFnError, StructureMismatchError
from shardinit.frontends import keras as frontend
from tests.core.bits import differing, unlike_jit

KEY = jax.random.key(5)


def convnet():
    return keras.Sequential(
        [
            keras.Input(shape=(28, 28, 1)),
            layers.Conv2D(32, kernel_size=(3, 3), activation="relu"),
            layers.MaxPooling2D(pool_size=(2, 2)),
            layers.Conv2D(64, kernel_size=(3, 3), activation="relu"),
            layers.MaxPooling2D(pool_size=(2, 2)),
            layers.Flatten(),
            layers.Dropout(0.5),
            layers.Dense(10, activation="softmax"),
        ]
    )


class TransformerBlock(layers.Layer):
    def __init__(self, embed_dim, num_heads, ff_dim, rate=0.1):
        super().__init__()
        self.att = layers.MultiHeadAttention(num_heads=num_heads, key_dim=embed_dim)
        self.ffn = keras.Sequential(
            [layers.Dense(ff_dim, activation="relu"), layers.Dense(embed_dim)]
        )
        self.layernorm1 = layers.LayerNormalization(epsilon=1e-6)
        self.layernorm2 = layers.LayerNormalization(epsilon=1e-6)
        self.dropout1 = layers.Dropout(rate)
        self.dropout2 = layers.Dropout(rate)

    def call(self, inputs):
        attn_output = self.dropout1(self.att(inputs, inputs))
        out1 = self.layernorm1(inputs + attn_output)
        ffn_output = self.dropout2(self.ffn(out1))
        return self.layernorm2(out1 + ffn_output)


class TokenAndPositionEmbedding(layers.Layer):
    def __init__(self, maxlen, vocab_size, embed_dim):
        super().__init__()
        self.token_emb = layers.Embedding(input_dim=vocab_size, output_dim=embed_dim)
        self.pos_emb = layers.Embedding(input_dim=maxlen, output_dim=embed_dim)

    def call(self, x):
        positions = ops.arange(start=0, stop=ops.shape(x)[-1], step=1)
        return self.token_emb(x) + self.pos_emb(positions)


def transformer():
    maxlen, vocab_size, embed_dim, num_heads, ff_dim = 64, 2000, 32, 2, 32
    inputs = layers.Input(shape=(maxlen,))
    x = TokenAndPositionEmbedding(maxlen, vocab_size, embed_dim)(inputs)
    x = TransformerBlock(embed_dim, num_heads, ff_dim)(x)
    x = layers.GlobalAveragePooling1D()(x)
    x = layers.Dropout(0.1)(x)
    x = layers.Dense(20, activation="relu")(x)
    x = layers.Dropout(0.1)(x)
    outputs = layers.Dense(2, activation="softmax")(x)
    return keras.Model(inputs=inputs, outputs=outputs)


def lstm():
    inputs = keras.Input(shape=(None,), dtype="int32")
    x = layers.Embedding(2000, 128)(inputs)
    x = layers.Bidirectional(layers.LSTM(32, return_sequences=True))(x)
    x = layers.Bidirectional(layers.LSTM(32))(x)
    outputs = layers.Dense(1, activation="sigmoid")(x)
    return keras.Model(inputs, outputs)


class Sampling(layers.Layer):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.seed_generator = keras.random.SeedGenerator(1337)

    def call(self, inputs):
        z_mean, z_log_var = inputs
        shape = ops.shape(z_mean)
        epsilon = keras.random.normal(shape=shape, seed=self.seed_generator)
        return z_mean + ops.exp(0.5 * z_log_var) * epsilon


def vae_encoder():
    latent_dim = 2
    encoder_inputs = keras.Input(shape=(28, 28, 1))
    x = layers.Conv2D(32, 3, activation="relu", strides=2, padding="same")(
        encoder_inputs
    )
    x = layers.Conv2D(64, 3, activation="relu", strides=2, padding="same")(x)
    x = layers.Flatten()(x)
    x = layers.Dense(16, activation="relu")(x)
    z_mean = layers.Dense(latent_dim, name="z_mean")(x)
    z_log_var = layers.Dense(latent_dim, name="z_log_var")(x)
    z = Sampling()([z_mean, z_log_var])
    return keras.Model(encoder_inputs, [z_mean, z_log_var, z], name="encoder")


class PatchEncoder(layers.Layer):
    def __init__(self, num_patches, projection_dim):
        super().__init__()
        self.num_patches = num_patches
        self.projection = layers.Dense(units=projection_dim)
        self.position_embedding = layers.Embedding(
            input_dim=num_patches, output_dim=projection_dim
        )

    def call(self, patch):
        positions = ops.expand_dims(
            ops.arange(start=0, stop=self.num_patches, step=1), axis=0
        )
        return self.projection(patch) + self.position_embedding(positions)


def vision_transformer(transformer_layers=3):
    num_patches, projection_dim, num_heads = 16, 64, 4
    inputs = keras.Input(shape=(num_patches, 108))
    encoded_patches = PatchEncoder(num_patches, projection_dim)(inputs)
    for _ in range(transformer_layers):
        x1 = layers.LayerNormalization(epsilon=1e-6)(encoded_patches)
        attention_output = layers.MultiHeadAttention(
            num_heads=num_heads, key_dim=projection_dim, dropout=0.1
        )(x1, x1)
        x2 = layers.Add()([attention_output, encoded_patches])
        x3 = layers.LayerNormalization(epsilon=1e-6)(x2)
        for units in (projection_dim * 2, projection_dim):
            x3 = layers.Dense(units, activation=keras.activations.gelu)(x3)
            x3 = layers.Dropout(0.1)(x3)
        encoded_patches = layers.Add()([x3, x2])
    representation = layers.LayerNormalization(epsilon=1e-6)(encoded_patches)
    representation = layers.Dropout(0.5)(layers.Flatten()(representation))
    logits = layers.Dense(100)(representation)
    return keras.Model(inputs=inputs, outputs=logits)


EXAMPLES = [convnet, transformer, lstm, vae_encoder, vision_transformer]


def at(tree, path):
    for part in path.split("/"):
        tree = tree[part]
    return tree


@pytest.mark.slow
@pytest.mark.parametrize("build", EXAMPLES)
def test_an_example_ends_sharded_with_the_values_of_jit(build, mesh):
    init = frontend.init_fn(build)
    rules = shardinit.fsdp("model", min_bytes=4096)
    plan = shardinit.plan(init, mesh=mesh, rules=rules)
    got = shardinit.compile_plan(plan)(KEY)
    assert unlike_jit(got, jax.jit(init.fn)(KEY)) == []
    for leaf in plan.leaves:
        array = at(got, leaf.path)
        assert array.sharding.is_equivalent_to(leaf.sharding, array.ndim)
    assert plan.bytes_per_device < plan.total_bytes / 3
    assert not {"host-random", "unused-key", "same-key"} & kinds(plan)


def kinds(plan):
    return {finding.kind for finding in plan.findings}


@pytest.mark.slow
@pytest.mark.once
@pytest.mark.parametrize("build", EXAMPLES)
def test_leaves_are_the_variables_that_keras_makes(build):
    leaves = {x.path: x for x in shardinit.plan(frontend.init_fn(build)).leaves}
    build()  # names of layers go on counting
    for _ in range(2):
        again = shardinit.plan(frontend.init_fn(build)).leaves
        assert [x.path for x in again] == list(leaves)
    made = {variable.path: variable for variable in keras_alone(build)}
    assert sorted(made) == sorted(leaves)
    for path, variable in made.items():
        assert leaves[path].shape == tuple(variable.shape)
        assert str(leaves[path].dtype) == variable.dtype


@pytest.mark.slow
def test_constant_variables_have_the_values_of_keras():
    arrays = shardinit.init(frontend.init_fn(lstm), KEY)
    made = {v.path: v for v in keras_alone(lstm)}
    for path, variable in made.items():
        if path.endswith("bias"):  # zeros, and ones for the forget gate
            assert np.array_equal(at(arrays, path), variable.value)


def keras_alone(build):
    """The variables of a model of Keras's making, names counted from the start."""
    keras.utils.clear_session()
    return build().variables


@pytest.mark.slow
def test_values_depend_on_key_and_path_alone():
    def values(layers_before, key):
        plan = shardinit.plan(frontend.init_fn(vision_transformer, layers_before))
        return shardinit.compile_plan(plan)(key)

    random.seed(0)
    three = values(3, 5)
    random.seed(1)
    four = values(4, 5)
    other = values(3, 6)
    paths = [
        "dense_2/kernel",
        "multi_head_attention_1/query/kernel",
        "seed_generator_1/seed_generator_state",
    ]
    for path in paths:
        assert differing(at(three, path), at(four, path)) == []
        assert differing(at(three, path), at(other, path)) != []


@pytest.mark.slow
def test_depth_adds_no_program():
    def programs(depth):
        return len(shardinit.plan(frontend.init_fn(vision_transformer, depth)).programs)

    assert programs(2) == programs(5)


@pytest.mark.slow
def test_a_model_is_filled_and_trains(mesh):
    rules = shardinit.PathRules(
        [
            (r"dense.*/kernel", PartitionSpec(None, "model")),
            ("", PartitionSpec()),
        ]
    )
    auto = jax.sharding.Mesh(mesh.devices, mesh.axis_names)
    arrays = shardinit.init(
        frontend.init_fn(vision_transformer, 1), KEY, mesh=auto, rules=rules
    )
    model = frontend.fill(vision_transformer, arrays, 1)
    kernel = next(v for v in model.variables if v.path.endswith("dense_1/kernel"))
    assert kernel.value.addressable_shards[0].data.shape == (64, 32)
    trainable = [v.value for v in model.trainable_variables]
    rest = [v.value for v in model.non_trainable_variables]

    def loss(trainable, rest, x):
        y, rest = model.stateless_call(trainable, rest, x, training=True)
        return y.mean(), rest

    x = jnp.ones((2, 16, 108))
    (value, _), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(
        trainable, rest, x
    )
    assert bool(jnp.isfinite(value))
    assert len(grads) == len(trainable)


def test_a_built_layer_is_its_own_description():
    layer = layers.MultiHeadAttention(2, 32, name="attention")
    layer.build((None, 4, 64), (None, 4, 64))
    before = layer.variables[0].value
    arrays = shardinit.init(frontend.init_fn(layer), KEY)
    assert layer.variables[0].value is before
    assert frontend.fill(layer, arrays) is layer
    assert (
        differing(layer.variables[0].value, at(arrays, layer.variables[0].path)) == []
    )


def test_the_dtype_policy_of_the_caller_counts():
    keras.config.set_dtype_policy("bfloat16")
    try:
        plan = shardinit.plan(frontend.init_fn(convnet))
    finally:
        keras.config.set_dtype_policy("float32")
    assert {str(x.dtype) for x in plan.leaves} == {"bfloat16", "uint32"}


def test_what_cannot_be_drawn_is_named():
    def unseeded(shape, dtype=None):
        return keras.random.normal(shape, dtype=dtype)

    def draws():
        dense = layers.Dense(4, kernel_initializer=unseeded)
        return keras.Sequential([keras.Input((3,)), dense])

    with pytest.raises(InitFnError, match="'sequential/dense/kernel'"):
        shardinit.plan(frontend.init_fn(draws))
    with pytest.raises(InitFnError, match="has no variables"):
        frontend.init_fn(lambda: layers.Dense(4))
    with pytest.raises(InitFnError, match="it returned dict"):
        frontend.init_fn(dict)
    with pytest.raises(InitFnError, match=r"frontends\.keras\.init_fn"):
        shardinit.plan(convnet())


def test_variables_of_one_path_are_refused():
    class Twice(layers.Layer):
        def build(self, shape):
            self.add_weight(shape=(3,), name="w")
            self.add_weight(shape=(4,), name="w")
            self.built = True

    def build():
        layer = Twice()
        layer.build(None)
        return layer

    with pytest.raises(DuplicateNamesError, match="twice/w"):
        frontend.init_fn(build)


def test_arrays_of_another_model_do_not_fill():
    arrays = shardinit.init(frontend.init_fn(vae_encoder), KEY)
    del arrays["conv2d"]
    with pytest.raises(StructureMismatchError, match="variable 'conv2d/kernel'"):
        frontend.fill(vae_encoder, arrays)


@pytest.mark.parametrize("backend", ["numpy", "tensorflow"])
def test_another_backend_is_named(backend):
    code = "from shardinit.frontends import keras; keras.init_fn(dict)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "KERAS_BACKEND": backend},
        capture_output=True,
        text=True,
        check=False,
    )
    assert f"Keras runs on {backend}" in done.stderr.splitlines()[-1]
    assert "KERAS_BACKEND=jax" in done.stderr.splitlines()[-1]
