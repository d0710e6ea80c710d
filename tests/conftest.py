"""What all tests share: one thread, fixed seeds, what "auto" precision means, and networks to share and to fold."""

from __future__ import annotations

import pytest
import torch
from hypothesis import settings
from torch import nn

import softshare

torch.set_num_threads(1)
settings.register_profile("tests", deadline=None, max_examples=25, derandomize=True)
settings.load_profile("tests")


def pytest_addoption(parser):
    text = 'what "auto" precision stands for on the CPU in the processes of the tests (default: what suits this one)'
    parser.addoption("--auto", choices=("float32", "bfloat16"), help=text)


@pytest.fixture(autouse=True, scope="session")
def precision_of_auto(request):
    """The same tests must pass on every machine, whatever its processor supports."""
    chosen = request.config.getoption("auto")
    with pytest.MonkeyPatch.context() as patched:
        if chosen:
            patched.setattr("softshare.training.devices.bfloat16_pays", lambda: chosen == "bfloat16")
        yield


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


class UNet(nn.Module):
    """A small U-Net in the common form: strided convolutions down, transposed ones up, skips by concatenation."""

    def __init__(self, channels: int = 4) -> None:
        super().__init__()
        c = channels
        self.enter = nn.Conv2d(3, c, 3, padding=1)
        self.down = nn.ModuleList(nn.Sequential(nn.Conv2d(c, c, 3, 2, 1), nn.BatchNorm2d(c), nn.ReLU()) for _ in "ab")
        self.middle = nn.Sequential(nn.Conv2d(c, c, 3, padding=2, dilation=2, bias=False), nn.ReLU())
        self.up = nn.ModuleList(nn.ConvTranspose2d(c, c, 2, 2) for _ in "ab")
        self.join = nn.ModuleList(nn.Conv2d(2 * c, c, 3, padding=1) for _ in "ab")
        self.leave = nn.Conv2d(c, 3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        skips = [self.enter(x)]
        for down in self.down:
            skips.append(down(skips[-1]))
        x = self.middle(skips.pop())
        for up, join in zip(self.up, self.join, strict=True):
            x = torch.relu(join(torch.cat([up(x), skips.pop()], 1)))
        return self.leave(x)


def transformer() -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
    for parameter in model.parameters():  # its layers start as copies of one another
        if parameter.dim() > 1:
            nn.init.xavier_uniform_(parameter)
    return model


FOREIGN = {"transformer": (transformer, (2, 5, 8)), "unet": (UNet, (2, 3, 8, 8))}


@pytest.fixture(params=FOREIGN)
def foreign(request):
    """A network from outside the package, not yet shared, and a batch for it."""
    torch.manual_seed(0)
    make, shape = FOREIGN[request.param]
    return make(), torch.randn(shape)


@pytest.fixture(scope="session")
def write_coefficients():
    """A function that writes coefficients (L, k) into one group of a model, or into all of them, and returns the model."""

    def write(model, rows, group=None):
        with torch.no_grad():
            for name, bank in softshare.banks(model).items():
                if group in (None, name):
                    bank.coefficients.copy_(torch.as_tensor(rows))
        return model

    return write


@pytest.fixture(scope="session")
def linears(write_coefficients):
    """A function that makes a shared network of plain linear layers with the given coefficients (L, k)."""

    def make(rows, size=4):
        rows = torch.as_tensor(rows)
        model = nn.Sequential(*(m for _ in rows for m in (nn.Linear(size, size), nn.Tanh())))
        softshare.share_(model.to(rows.dtype), rows.shape[1])
        return write_coefficients(model, rows)

    return make


@pytest.fixture(scope="session")
def tied_rows():
    """A function that draws coefficients (L, k) that tie exactly within each cluster, with scales of either sign."""

    def draw(clusters, templates, layers, dtype=torch.float32):
        rows = torch.randn(layers, templates, dtype=dtype)
        for cluster in clusters:
            for place, layer in enumerate(cluster):
                rows[layer - 1] = rows[cluster[0] - 1] * (-1.5) ** place
        return rows

    return draw
