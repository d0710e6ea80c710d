"""ImageNet recipes stream a folder of images."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from softshare import models
from softshare.studies import STUDIES, run


@pytest.mark.parametrize("name", ["WRN 50-2", "SWRN 50-2"])
def test_imagenet_recipes_stream_a_folder(name, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="--data on the command line"):
        run(name, "fast", runs=tmp_path)
    random = np.random.default_rng(0)
    for split, n in (("train", 3), ("val", 2)):
        for label in ("cat", "dog"):
            folder = tmp_path / "images" / split / label
            folder.mkdir(parents=True)
            for number in range(n):
                Image.fromarray(random.integers(0, 255, (70, 80, 3), dtype=np.uint8)).save(folder / f"{number}.jpg")
    small = models.build("SWRN 16-1", 2)
    monkeypatch.setattr(STUDIES["imagenet"], "network", lambda *_: small, raising=False)
    record = run(name, "fast", 0, str(tmp_path / "images"), runs=tmp_path, checkpoints=tmp_path / "c", progress=False)
    assert {"top1_error", "top5_error"} <= set(record.metrics) and record.data["source"] == "images"
    assert record.network == name.replace("-2", "-1")  # the narrow relative of profile fast
