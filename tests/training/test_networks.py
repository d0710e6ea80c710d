"""Every network of the poster trains in the same loop: on one batch of real images the loss falls."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from softshare import images, models
from softshare.models import Network
from softshare.training import Classification, Settings, fit
from softshare.training.streaming import StreamedImages

CIFAR = {
    "WRN 28-10": {},
    "SWRN 28-10-2": {},
    "ResNeXt-29 16x64": {},
    "DenseNet 100-24": {},
    "DenseNet 190-40": {},
    **{name: {"repeats": 1} for name in ("NASNet-A", "AmoebaNet-B", "DARTS", "SNAS", "ENAS")},
}
IMAGENET = ("WRN 50-2", "SWRN 50-2", "DenseNet-264", "ResNet-200")


@pytest.fixture(scope="module")
def batch():
    """32 images of CIFAR-10, always the same, without augmentation."""
    try:
        train = images.load("cifar10", "train")
    except FileNotFoundError:
        pytest.skip("no copy of CIFAR-10 was found; set SOFTSHARE_DATA")
    some = train.split(32)[0]
    return Classification(some, None, images.Augmentation(*train.statistics(), flip=False, pad=0))


def falls(model, task, rate, steps):
    settings = Settings(epochs=steps, batch_size=32, rate=rate, milestones=(), weight_decay=0.0, precision="float32")
    history = fit(model, task, settings, progress=False, device="cpu")
    losses = [row["loss"] for row in history]
    return min(losses[-3:]) / losses[0]


@pytest.mark.long
@pytest.mark.parametrize("name", CIFAR)
def test_the_loss_on_one_batch_of_real_images_falls(name, batch):
    torch.manual_seed(0)
    network = Network.parse(name).narrowed()
    model = models.build(network, 10, **CIFAR[name])
    assert falls(model, batch, 0.05, 30) < 0.8, "a few dozen steps must be enough to learn 32 images"


@pytest.mark.long
def test_an_auxiliary_head_trains_along_on_real_images(batch):
    torch.manual_seed(0)
    model = models.cell_network("DARTS", 4, repeats=1, auxiliary=True, drop_path=0.2)
    assert falls(model, batch, 0.05, 30) < 0.8


@pytest.mark.long
@pytest.mark.parametrize("name", IMAGENET)
def test_the_loss_on_one_batch_of_larger_images_falls(name, tmp_path):
    """Made images of 96 pixels in a folder, as ImageNet has them, decoded and cropped at 64."""
    random = np.random.default_rng(0)
    for split, n in (("train", 8), ("val", 2)):
        for label in ("a", "b"):
            (tmp_path / split / label).mkdir(parents=True)
            for number in range(n):
                pixels = random.integers(0, 256, (12, 12, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
                Image.fromarray(pixels // (1 + (label == "b"))).save(tmp_path / split / label / f"{number}.png")
    torch.manual_seed(0)
    model = models.build(Network.parse(name).narrowed(), 2)
    assert falls(model, StreamedImages(tmp_path, side=64, workers=0), 0.02, 24) < 0.8


@pytest.mark.long
@pytest.mark.parametrize("name", [*CIFAR, *IMAGENET])
def test_the_whole_graph_of_a_network_is_captured_for_compiling(name):
    """Without the slow part, making kernels of it."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    network = Network.parse(name).narrowed()
    if name in ("DenseNet 190-40", "DenseNet-264", "ResNet-200"):
        pytest.skip("hundreds of layers of the kinds that the shallower networks have")
    model = models.build(network, 10, **CIFAR.get(name, {}))
    x = torch.randn(2, 3, 64 if network.imagenet else 32, 64 if network.imagenet else 32)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled.eval()(x), model.eval()(x), atol=1e-4, rtol=1e-4)


@pytest.mark.long
def test_a_searched_network_compiles_and_trains_compiled(batch):
    torch.manual_seed(0)
    model = models.cell_network("DARTS", 4, repeats=1, drop_path=0.2)
    settings = Settings(epochs=2, batch_size=32, rate=0.05, precision="float32", compile=True)
    history = fit(model, batch, settings, progress=False, device="cpu")
    assert history.execution["compiled"] is True
