"""Images streamed from a folder: what comes out, how far ahead it is read, and what happens to damaged ones."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import threading
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from softshare.training.streaming import StreamedImages

MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
DEVIATION = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
BIRDS, CATS = 13, 11  # training images


def picture(seed, width, height, mode="RGB"):
    """Smooth random colours."""
    random = np.random.default_rng(seed)
    small = Image.fromarray(random.integers(0, 256, (4, 5, 3), dtype=np.uint8))
    return small.resize((width, height), Image.Resampling.BICUBIC).convert(mode)


def write(root):
    for split, numbers in {"train": {"bird": BIRDS, "cat": CATS}, "val": {"bird": 3, "cat": 4}}.items():
        for label, number in numbers.items():
            folder = root / split / label
            folder.mkdir(parents=True)
            for index in range(number):
                image = picture(1000 * len(split) + 100 * len(label) + index, 70 + 9 * index, 130 - 7 * index)
                image.save(folder / (f"{index}.JPEG" if index % 3 else f"{index}.png"))
            (folder / ".hidden.png").write_bytes(b"no image")
            (folder / "notes.txt").write_text("no image either")
    picture(1, 90, 80, "L").save(root / "train/cat/0.png")
    picture(2, 90, 80, "RGBA").save(root / "train/cat/3.png")
    picture(3, 90, 80, "CMYK").save(root / "train/cat/4.JPEG")
    (root / "train" / ".thumbnails").mkdir()
    return root


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return write(tmp_path_factory.mktemp("streamed") / "animals")


@pytest.fixture
def folder(written, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(written, tmp_path / "animals")


def epoch_of(task, batch_size, seed=0, epoch=1):
    batches = list(task.batches(torch.arange(task.size).split(batch_size), seed, epoch))
    return torch.cat([images for images, _ in batches]), torch.cat([labels for _, labels in batches])


def normalised(image):
    pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1) / 255.0
    return (pixels - MEAN) / DEVIATION


# ------------------------------------------------------------------------------------------------------------- the data


def test_what_a_folder_holds(written):
    task = StreamedImages(written, 32, workers=0)
    assert (task.size, task.classes, task.source) == (BIRDS + CATS, ("bird", "cat"), "animals")
    images, labels = task.batch(torch.arange(task.size), 0, 1)
    assert images.shape == (task.size, 3, 32, 32) and images.dtype == torch.float32
    assert labels.tolist() == [0] * BIRDS + [1] * CATS and labels.dtype == torch.int64


def test_imagenet_is_known_by_its_classes(tmp_path):
    for index in range(1000):
        (tmp_path / "train" / f"n{index:08}").mkdir(parents=True)
        (tmp_path / "train" / f"n{index:08}" / "1.JPEG").touch()
    assert StreamedImages(tmp_path, held_out=None).source == "ImageNet"
    (tmp_path / "train" / "n00000999").rename(tmp_path / "train" / "others")
    assert StreamedImages(tmp_path, held_out=None).source == tmp_path.name


def test_the_fingerprint_is_of_names_and_sizes(written, folder):
    def fingerprint():
        return StreamedImages(folder, 32).fingerprint

    same = StreamedImages(written, 64).fingerprint
    os.utime(folder / "train/cat/1.JPEG", (1, 1))
    assert fingerprint() == same
    (folder / "train/cat/.more.png").touch()
    assert fingerprint() == same
    (folder / "val/cat/1.JPEG").rename(folder / "val/cat/z.JPEG")
    renamed = fingerprint()
    with open(folder / "val/cat/z.JPEG", "ab") as file:
        file.write(b"\0")
    assert len({same, renamed, fingerprint()}) == 3


def test_a_folder_called_test_can_replace_val(folder):
    (folder / "val").rename(folder / "test")
    for split in ("val", "test"):
        assert StreamedImages(folder, 32, 0, split).evaluate(lambda images: torch.zeros(len(images), 2))["error"] > 0
    assert StreamedImages(folder, 32, 0, None).evaluate(None) == {}


# ------------------------------------------------------------------------------------------------------------- training


def test_an_epoch_does_not_depend_on_batches_and_workers(written):
    images, labels = epoch_of(StreamedImages(written, 32, workers=0), 5, seed=3, epoch=2)
    for workers, batch_size in ((1, 24), (2, 3), (2, 5)):
        others = epoch_of(StreamedImages(written, 32, workers=workers), batch_size, seed=3, epoch=2)
        assert torch.equal(images, others[0]) and torch.equal(labels, others[1])
    some = torch.tensor([20, 3, 11])
    assert torch.equal(StreamedImages(written, 32).batch(some, 3, 2)[0], images[some])
    for seed, epoch in ((3, 1), (2, 2), (-3, 2)):
        other = epoch_of(StreamedImages(written, 32, workers=0), 24, seed, epoch)[0]
        assert (other != images).flatten(1).any(1).all()


def test_copies_of_an_image_are_cropped_differently(folder):
    shutil.copy(folder / "train/bird/1.JPEG", folder / "train/bird/10.JPEG")  # the next one, sorted as text
    images = StreamedImages(folder, 32, 0).batch(torch.tensor([1, 2]), 0, 1)[0]
    assert not torch.equal(images[0], images[1])


def test_reading_leaves_the_default_generator_alone(written):
    before = torch.get_rng_state()
    epoch_of(StreamedImages(written, 32, workers=1), 24)
    assert torch.equal(torch.get_rng_state(), before)


def test_crops_have_the_areas_and_aspects_asked_for(tmp_path):
    """Images whose red and green are their coordinates show what was cut out."""
    width, height = 255, 255
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    pixels = np.stack([x * 255 / width, y * 255 / height, 0 * x], 2).round().astype(np.uint8)
    (tmp_path / "train" / "only").mkdir(parents=True)
    Image.fromarray(pixels).save(tmp_path / "train" / "only" / "it.png")
    task = StreamedImages(tmp_path, 16, 0, None)
    areas, aspects, flips, centres = [], [], [], []
    for epoch in range(600):
        image = (task.batch(torch.tensor([0]), 0, epoch)[0][0] * DEVIATION + MEAN) * 255  # (3, 16, 16)
        across, down = image[0].mean(0), image[1].mean(1)  # (16,); the outer pixels lie half a pixel from the edge
        wide, high = (float(line[-1] - line[0]).__abs__() / 255 * 16 / 15 for line in (across, down))
        areas.append(wide * high)
        aspects.append(wide * width / (high * height))
        flips.append(bool(across[0] > across[-1]))
        centres.append((float(across.mean()) / 255, float(down.mean()) / 255))
    assert 0.07 < min(areas) < 0.11 and 0.85 < max(areas) < 1.02
    assert 0.72 < min(aspects) < 0.80 and 1.25 < max(aspects) < 1.40
    assert np.median(aspects) == pytest.approx(1.0, abs=0.05)
    assert 0.43 < np.mean(flips) < 0.57
    assert np.mean(centres, 0) == pytest.approx([0.5, 0.5], abs=0.03)
    assert np.std(centres, 0).min() > 0.1


def test_a_large_jpeg_decoded_small_shows_the_same(tmp_path):
    """An image decoded at a fraction of its size gives nearly the same crop as its lossless version."""
    for suffix in ("png", "jpg"):
        (tmp_path / suffix / "train" / "only").mkdir(parents=True)
        picture(5, 1001, 803).save(tmp_path / suffix / "train" / "only" / f"it.{suffix}")
    first, second = (StreamedImages(tmp_path / suffix, 32, 0, None) for suffix in ("png", "jpg"))
    for epoch in range(10):
        images = [task.batch(torch.tensor([0]), 0, epoch)[0] * DEVIATION for task in (first, second)]
        assert (images[0] - images[1]).abs().max() < 0.06


@pytest.mark.parametrize("shape", [(400, 2), (2, 400), (1, 1)])
def test_extreme_shapes(tmp_path, shape):
    for split in ("train", "val"):
        (tmp_path / split / "only").mkdir(parents=True)
        picture(0, *shape).save(tmp_path / split / "only" / "it.png")
    task = StreamedImages(tmp_path, 8, 0)
    assert epoch_of(task, 1)[0].isfinite().all()
    assert task.evaluate(lambda images: torch.zeros(len(images), 1))["top5_error"] == 0


def test_images_of_other_modes(written, folder):
    """Grey, transparent and CMYK images are treated like their RGB versions, saved here beforehand."""
    for name in ("0.png", "3.png", "4.JPEG"):
        with Image.open(written / "train/cat" / name) as image:
            assert image.mode != "RGB"
            image.convert("RGB").save(folder / "train/cat" / name, "PNG")
    some = BIRDS + torch.tensor([0, 3, 4])
    theirs, ours = (StreamedImages(root, 80).batch(some, 0, 1)[0] for root in (folder, written))
    assert torch.equal(ours, theirs) and all(image.std() > 0.1 for image in ours)


# ----------------------------------------------------------------------------------------------------------- evaluation


@pytest.mark.parametrize(("side", "workers"), [(32, 0), (49, 2)])
def test_evaluation_by_hand(written, side, workers):
    seen = []

    def predict(images):
        seen.append(images)
        return images.mean((2, 3))[:, :2] * 3.0

    found = StreamedImages(written, side, workers).evaluate(predict)
    expected, labels = [], []
    for label, name in enumerate(("bird", "cat")):
        for path in sorted((written / "val" / name).glob("[0-9]*")):
            with Image.open(path) as image:
                width, height = image.size
                short = round(side * 256 / 224)
                if width < height:
                    width, height = short, int(height * short / width)
                else:
                    width, height = int(width * short / height), short
                left, top = round((width - side) / 2), round((height - side) / 2)
                resized = image.resize((width, height), Image.Resampling.BILINEAR)
                expected.append(normalised(resized.crop((left, top, left + side, top + side))))
                labels.append(label)
    torch.testing.assert_close(torch.cat(seen), torch.stack(expected))
    logits = torch.stack(expected).mean((2, 3))[:, :2] * 3.0
    wrong = 100 * sum(int(row.argmax()) != label for row, label in zip(logits, labels, strict=True)) / 7
    assert found["top1_error"] == found["error"] == pytest.approx(wrong)
    assert found["accuracy"] == pytest.approx(100 - wrong) and found["top5_error"] == 0
    assert found["loss"] == pytest.approx(float(F.cross_entropy(logits, torch.tensor(labels))), rel=1e-5)


def test_five_guesses(tmp_path):
    for split in ("train", "val"):
        for label in range(7):
            (tmp_path / split / str(label)).mkdir(parents=True)
            picture(label, 20, 20).save(tmp_path / split / str(label) / "it.png")
    task = StreamedImages(tmp_path, 8, 0)
    found = task.evaluate(lambda images: torch.arange(7.0).expand(len(images), 7))  # guesses 6, 5, 4, 3, 2
    assert found["top5_error"] == pytest.approx(200 / 7) and found["top1_error"] == pytest.approx(600 / 7)


# --------------------------------------------------------------------------------------------------- reading ahead


@pytest.mark.parametrize(("workers", "ahead"), [(0, 0), (1, 2), (2, 4)])
def test_at_most_two_batches_per_worker_are_read_ahead(folder, workers, ahead):
    """All files go bad after the first batch, so the good batches that still come were read ahead."""
    task = StreamedImages(folder, 16, workers)
    batches = task.batches(torch.arange(task.size).split(1), 0, 1)
    next(batches)
    time.sleep(1.0)  # long enough to read them all
    for path in (folder / "train").rglob("[0-9]*.*"):
        path.write_bytes(b"gone bad")
    good = 0
    with pytest.raises(ValueError, match="not a readable image"):
        for _ in batches:
            good += 1
    assert good == ahead


def test_workers_end_with_the_epoch(written):
    task = StreamedImages(written, 16, 2)
    epoch_of(task, 6)
    assert not multiprocessing.active_children()
    batches = task.batches(torch.arange(task.size).split(2), 0, 1)
    next(batches)
    assert len(multiprocessing.active_children()) == 2
    batches.close()
    assert not multiprocessing.active_children()


# --------------------------------------------------------------------------------------------------------------- faults


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("damage", ["truncated", "checksum", "text", "gone", "deep"])
def test_a_damaged_image_is_named(folder, workers, damage):
    path = folder / "train" / "cat" / ("5.JPEG" if damage == "truncated" else "6.png")
    task, data = StreamedImages(folder, 16, workers), bytearray(path.read_bytes())
    if damage == "truncated":
        path.write_bytes(data[: len(data) // 2])
    elif damage == "checksum":
        data[-14] ^= 1  # of the pixels; an end of 12 bytes follows
        path.write_bytes(data)
    elif damage == "text":
        path.write_text("Error 404")
    elif damage == "gone":
        path.unlink()
    elif damage == "deep":
        Image.fromarray(np.full((9, 9), 40_000, np.uint16)).save(path)
    with pytest.raises(ValueError, match=f"^{path} is not a readable image") as caught:
        epoch_of(task, 4)
    assert "Traceback" not in str(caught.value) and not multiprocessing.active_children()


def killed(wait):
    wait()
    os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)


def test_a_worker_killed_while_a_batch_is_used(written):
    """The error comes with the next batch, not while the caller uses this one."""
    task = StreamedImages(written, 16, 2)
    epoch_of(task, 24)
    handler = signal.getsignal(signal.SIGCHLD)
    batches = task.batches(torch.arange(task.size).split(1), 0, 1)
    next(batches)
    killed(lambda: None)
    for _ in range(20):
        time.sleep(0.01)  # the signal arrives here
    with pytest.raises(RuntimeError, match=r"2 workers.*animals died.*fewer workers or smaller batches"):
        next(batches)
    assert len(epoch_of(task, 6)[1]) == task.size  # and it works again
    assert signal.getsignal(signal.SIGCHLD) is handler


def test_a_worker_killed_while_waiting_for_a_batch(folder):
    task = StreamedImages(folder, 16, 1)
    slow = folder / "train/bird/0.png"
    slow.unlink()
    os.mkfifo(slow)  # a file that never ends
    killer = threading.Thread(target=killed, args=(lambda: time.sleep(0.5),))
    killer.start()
    with pytest.raises(RuntimeError, match="1 workers.*died"):
        epoch_of(task, 4)
    killer.join()


def test_other_runtime_errors_are_not_changed(written):
    batches = StreamedImages(written, 16, 1).batches([torch.arange(2), torch.arange(2)], 0, 1)
    next(batches)
    with pytest.raises(RuntimeError, match="^out of memory$"):
        batches.throw(RuntimeError("out of memory"))


@pytest.mark.parametrize(
    ("damage", "error", "says"),
    [
        (lambda root: shutil.rmtree(root), FileNotFoundError, "no image folder at .*animals"),
        (lambda root: shutil.rmtree(root / "train"), ValueError, "no images as train/<class>/<file>"),
        (lambda root: shutil.rmtree(root / "val"), ValueError, "no images as val/<class>/<file>"),
        (lambda root: shutil.rmtree(root / "val" / "cat"), ValueError, "'val' has no images of cat"),
        (lambda root: shutil.rmtree(root / "train" / "bird"), ValueError, "'train' has no images of bird"),
        (lambda root: (root / "train" / "dog").mkdir(), ValueError, "'train' has no images of dog"),
        (lambda root: shutil.move(root / "val/cat", root / "val/.cat"), ValueError, "'val' has no images of cat"),
    ],
)
def test_an_incomplete_folder(folder, damage, error, says):
    damage(folder)
    with pytest.raises(error, match=says):
        StreamedImages(folder)


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"side": 0}, ValueError, "side.*0"),
        ({"side": 32.0}, TypeError, "side"),
        ({"workers": -1}, ValueError, "workers.*-1"),
        ({"workers": False}, TypeError, "workers.*False"),
        ({"workers": "2"}, TypeError, "workers.*'2'"),
        ({"held_out": "train"}, ValueError, "held_out.*'train'"),
    ],
)
def test_bad_arguments(written, arguments, error, says):
    with pytest.raises(error, match=says):
        StreamedImages(written, **arguments)


def test_an_archive_is_refused(tmp_path):
    (tmp_path / "images.zip").write_bytes(b"")
    with pytest.raises(ValueError, match="images.zip.*unpacked first"):
        StreamedImages(tmp_path / "images.zip")
