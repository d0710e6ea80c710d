"""What all tests share: one thread, fixed seeds, and networks written by other people."""

from __future__ import annotations

import pytest
import torch
from hypothesis import settings
from torch import nn

torch.set_num_threads(1)
settings.register_profile("tests", deadline=None, max_examples=25, derandomize=True)
settings.load_profile("tests")


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
    """A network that nobody here wrote, not yet shared, and a batch for it."""
    torch.manual_seed(0)
    make, shape = FOREIGN[request.param]
    return make(), torch.randn(shape)
