"""Models of torchvision, timm and diffusers, if they go with the installed torch."""

import jax
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

from shardinit.frontends import torch as frontend
from tests.frontends.torch_like import faults

pytestmark = [pytest.mark.slow, pytest.mark.once, pytest.mark.filterwarnings("ignore")]


def library(name):
    """A library, or the test is skipped; it may be built for another torch."""
    try:
        return pytest.importorskip(name, reason=f"{name} is not installed")
    except RuntimeError as error:
        pytest.skip(f"{name} does not go with torch {torch.__version__}: {error}")


def check(build):
    fn = frontend.init_fn(build)
    assert faults(fn, fn.fn(jax.random.key(1)), build) == []


@pytest.mark.parametrize("name", ["resnet18", "vit"])
def test_torchvision(name):
    models = library("torchvision").models
    if name == "resnet18":
        check(models.resnet18)
    else:
        check(lambda: models.VisionTransformer(32, 8, 2, 4, 64, 128))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        (
            "vit_tiny_patch16_224",
            {"depth": 2, "embed_dim": 64, "num_heads": 2, "img_size": 64},
        ),
        ("convnext_atto", {"depths": (1, 1, 2, 1), "dims": (8, 16, 32, 64)}),
        (
            "swin_tiny_patch4_window7_224",
            {"depths": (1, 1, 1, 1), "embed_dim": 24, "num_heads": (1, 2, 4, 8)},
        ),
    ],
)
def test_timm(name, options):
    library("torchvision")
    timm = library("timm")
    check(lambda: timm.create_model(name, **options))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        (
            "UNet2DModel",
            {
                "sample_size": 16,
                "block_out_channels": (32, 64),
                "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
                "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
                "norm_num_groups": 8,
            },
        ),
        (
            "DiTTransformer2DModel",
            {
                "num_attention_heads": 2,
                "attention_head_dim": 16,
                "num_layers": 2,
                "sample_size": 8,
                "num_embeds_ada_norm": 10,
            },
        ),
        ("AutoencoderKL", {"block_out_channels": (32,), "norm_num_groups": 8}),
    ],
)
def test_diffusers(name, options):
    diffusers = library("diffusers")
    check(lambda: getattr(diffusers, name)(**options))
