"""Which device trains, in which precision, and with which kernels."""

from __future__ import annotations

import pytest
import torch

from softshare import models
from softshare.training import NoSuchDevice, Settings, fit, pick_device, pick_precision
from softshare.training.devices import autocast, convolution_kernels, precision_name
from softshare.training.processor import bfloat16_pays

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_missing_gpu_is_named(task, small_net):
    with pytest.raises(RuntimeError, match="no CUDA GPU"):
        fit(small_net(), task, Settings(epochs=1), device="cuda", progress=False)
    with pytest.raises(NoSuchDevice, match="'cuda:1' was requested"):
        pick_device("cuda:1")


def test_the_device_is_a_gpu_if_available(monkeypatch):
    assert pick_device("cpu") == CPU == pick_device(CPU)
    for there in (True, False):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        assert pick_device() == (CUDA if there else CPU)


@pytest.mark.parametrize(("device", "says"), [("gpu", "unknown device 'gpu'; known: cpu"), ("meta", "holds no values")])
def test_devices_that_cannot_train(task, device, says):
    with pytest.raises(ValueError, match=says):
        fit(models.wrn(10, 1), task, Settings(epochs=1), device=device, progress=False)


@pytest.mark.parametrize("pays", [True, False])
def test_auto_on_a_processor(monkeypatch, pays):
    monkeypatch.setattr("softshare.training.devices.bfloat16_pays", lambda: pays)
    assert pick_precision("auto", CPU) is (torch.bfloat16 if pays else torch.float32)


@pytest.mark.parametrize(("capability", "expected"), [((7, 5), "float16"), ((8, 0), "bfloat16"), ((9, 0), "bfloat16")])
def test_auto_on_a_gpu(monkeypatch, capability, expected):
    """A T4 (7.5) has no units for bfloat16."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert precision_name(pick_precision("auto", CUDA)) == expected


def test_auto_is_what_the_option_says(request):
    """``pytest --auto float32`` and ``--auto bfloat16`` run the tests as on machines of either kind."""
    suits = "bfloat16" if bfloat16_pays() else "float32"
    assert precision_name(pick_precision("auto", CPU)) == (request.config.getoption("auto") or suits)


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("device", [CPU, CUDA], ids=str)
def test_a_named_precision_is_used(name, device):
    assert precision_name(pick_precision(name, device)) == name


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
def test_products_under_autocast(name):
    dtype = getattr(torch, name)
    with autocast(CPU, dtype):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype is dtype


def test_convolution_kernels_are_searched_for_and_settings_restored():
    def flags():
        return torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32

    before = flags()
    for tf32 in (True, False):
        with convolution_kernels(CUDA, tf32):
            assert flags() == (True, tf32)
        assert flags() == before
    with convolution_kernels(CPU, False):
        assert flags() == before
