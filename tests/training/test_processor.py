"""The check that keeps PyTorch off matrix units that crash it, and whether bfloat16 pays."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from softshare.training import processor
from softshare.training.processor import avoid_crashing_units, bfloat16_pays, interpreter, processor_name

VARIABLE = "ONEDNN_MAX_CPU_ISA"


def test_a_given_setting_is_kept(tmp_path, monkeypatch):
    monkeypatch.setenv(VARIABLE, "AVX2")
    assert avoid_crashing_units(tmp_path) is False
    assert os.environ[VARIABLE] == "AVX2" and not list(tmp_path.iterdir())


def test_bfloat16_products_survive_after_the_import():
    """The crash that the check prevents kills the interpreter, so another one is started to look for it."""
    code = "import softshare, torch; torch.ones(128, 256).bfloat16() @ torch.ones(256, 256).bfloat16()"
    clean = {name: value for name, value in os.environ.items() if name != VARIABLE}
    assert subprocess.run([sys.executable, "-c", code], env=clean, timeout=120).returncode == 0


@pytest.fixture
def amx_machine(monkeypatch):
    """A machine that announces AMX: a function that sets how a process trying it ends, and returns such processes."""
    tried = []
    read = processor.Path.read_text

    def fake_read(path, **how):
        if str(path) == "/proc/cpuinfo":
            return "model name : A processor: fast\nflags : sse amx_bf16 amx_tile\n"
        return "1234\n" if path.name == "boot_id" else read(path, **how)

    def ends(status):
        monkeypatch.delenv(VARIABLE, raising=False)

        def run(*arguments, **how):
            tried.append(arguments)
            if status is None:
                raise subprocess.TimeoutExpired("python", 120)
            return subprocess.CompletedProcess([], status)

        monkeypatch.setattr(processor.subprocess, "run", run)
        return tried

    monkeypatch.setenv(VARIABLE, "")  # so that it is restored at the end
    monkeypatch.setattr(processor.platform, "system", lambda: "Linux")
    monkeypatch.setattr(processor.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(processor.Path, "read_text", fake_read)
    return ends


@pytest.mark.parametrize(
    ("status", "crashes"), [(-4, True), (-11, True), (0, False), (1, False), (-9, False)]
)  # killed by SIGILL or SIGSEGV; success; an error; killed otherwise
def test_the_check_works_without_a_place_to_remember(amx_machine, status, crashes):
    amx_machine(status)
    assert avoid_crashing_units(processor.Path("/proc/nowhere")) is crashes
    assert os.environ.get(VARIABLE) == ("AVX512_CORE_BF16" if crashes else None)


def test_the_outcome_is_remembered_and_tried_again_if_it_cannot_be_read(amx_machine, tmp_path):
    for status, crashes in ((-4, True), (0, True)):  # the second is not tried
        tried = amx_machine(status)
        assert avoid_crashing_units(tmp_path) is crashes and len(tried) == 1
    (kept,) = tmp_path.iterdir()
    kept.write_text("who knows")
    amx_machine(0)
    assert avoid_crashing_units(tmp_path) is False and len(tried) == 2 and kept.read_text() == "works\n"


@pytest.mark.parametrize("status", [1, 127, -9, -15])
def test_only_success_counts_as_working(amx_machine, tmp_path, status):
    """Any other end of the probe says nothing about the units, and is not remembered."""
    amx_machine(status)
    assert avoid_crashing_units(tmp_path) is False and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "executable",
    [None, "", "/opt/blender/blender", "/usr/bin/uwsgi", "C:\\apps\\Editor.exe", "./app", "/opt/python-app"],
)
def test_anything_but_an_interpreter_is_not_started(amx_machine, tmp_path, monkeypatch, executable):
    """An application would start itself again and again, without end."""
    tried = amx_machine(-4)
    monkeypatch.setattr(processor.sys, "executable", executable)
    assert interpreter() is None
    assert avoid_crashing_units(tmp_path) is False and not tried and not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["python", "python3", "python3.11", "Python", "python.exe", "pypy3", "python3.13t"])
def test_names_of_interpreters(monkeypatch, name):
    monkeypatch.setattr(processor.sys, "executable", f"/usr/bin/{name}")
    assert interpreter() == f"/usr/bin/{name}"
    monkeypatch.setattr(processor.sys, "frozen", True, raising=False)
    assert interpreter() is None


def test_a_probe_does_not_start_another(amx_machine, tmp_path, monkeypatch):
    """If the site's start-up files import softshare, the probe does as well."""
    tried = amx_machine(-4)
    monkeypatch.setenv("SOFTSHARE_PROBING", "1")
    assert avoid_crashing_units(tmp_path) is False and not tried


def test_a_check_that_does_not_end_changes_nothing(amx_machine, tmp_path):
    amx_machine(None)
    assert avoid_crashing_units(tmp_path) is False
    assert VARIABLE not in os.environ and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("amx", "dots", "setting", "expected"),
    [
        (True, True, None, True),
        (True, True, "AVX512_CORE_BF16", False),  # Intel's dot products alone are as fast as float32
        (True, True, "AVX512_CORE_AMX", True),
        (True, True, "AVX2", False),  # a limit set by somebody else counts, too
        (False, True, None, True),  # AMD
        (False, True, "AVX2", False),
        (False, True, "avx512_core_bf16", True),
        (False, False, None, False),
        (None, None, None, False),  # an older PyTorch, which cannot tell
    ],
)
def test_where_bfloat16_pays(monkeypatch, amx, dots, setting, expected):
    for name, value in (("amx_tile", amx), ("avx512_bf16", dots)):
        attribute = f"_is_{name}_supported"
        if value is None:
            monkeypatch.delattr(torch.cpu, attribute, raising=False)
        else:
            monkeypatch.setattr(torch.cpu, attribute, lambda value=value: value, raising=False)
    monkeypatch.delenv(VARIABLE, raising=False)
    if setting:
        monkeypatch.setenv(VARIABLE, setting)
    assert bfloat16_pays() is expected


def test_the_name_of_the_processor(amx_machine):
    amx_machine(0)
    assert processor_name() == "A processor: fast"
