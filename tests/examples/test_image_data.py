"""ImageNet's folders and Fashion-MNIST's files, and the networks for them."""

from __future__ import annotations

import gzip
import struct

import numpy as np
import pytest
import torch
from common import decayed_apart
from image_classification import (
    ClassFolders,
    ResNet,
    fashion_mnist,
    load,
    make_images,
    middle_box,
    random_box,
)
from PIL import Image
from vision_transformer import VisionTransformer


def save(path, colour, size=(50, 40), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path)


@pytest.fixture
def folders(tmp_path):
    """Two classes, the second of which was written first; both formats, three modes, and a file that is no image."""
    save(tmp_path / "n02" / "a.JPEG", (0, 0, 255))
    save(tmp_path / "n02" / "b.png", (0, 0, 255, 128), mode="RGBA")
    save(tmp_path / "n01" / "c.jpg", 200, size=(1, 9), mode="L")
    (tmp_path / "n01" / "notes.txt").write_text("no image")
    (tmp_path / "README").write_text("no class")
    return tmp_path


@pytest.mark.parametrize("train", [True, False])
def test_classes_are_numbered_by_the_alphabet(folders, train):
    dataset = ClassFolders(folders, 16, train)
    assert dataset.classes == ["n01", "n02"]
    assert [(path.name, number) for path, number in dataset.files] == [("c.jpg", 0), ("a.JPEG", 1), ("b.png", 1)]
    for index in range(len(dataset)):
        pixels, number = dataset[index]
        assert pixels.shape == (3, 16, 16)
        assert number == dataset.files[index][1]
    blue = dataset[1][0].mean((1, 2))
    torch.testing.assert_close(blue, torch.tensor([-0.485 / 0.229, -0.456 / 0.224, 0.594 / 0.225]), atol=0.03, rtol=0)


def test_what_is_missing_or_broken_is_named(folders, tmp_path):
    with pytest.raises(SystemExit, match="there is no folder"):
        ClassFolders(tmp_path / "nowhere", 16, True)
    (tmp_path / "empty" / "class").mkdir(parents=True)
    with pytest.raises(SystemExit, match="no folders with JPEG or PNG"):
        ClassFolders(tmp_path / "empty", 16, True)
    (folders / "n01" / "a.png").write_bytes(b"not a picture")
    with pytest.raises(OSError, match=r"a\.png"):
        ClassFolders(folders, 16, True)[0]
    for part, name in (("train", "cat"), ("val", "dog")):
        save(tmp_path / "other" / part / name / "1.png", (1, 2, 3))
    with pytest.raises(SystemExit, match="different classes"):
        load(tmp_path / "other", 16)


def test_boxes_lie_within_the_image():
    torch.manual_seed(0)
    areas = []
    for _ in range(300):
        left, top, right, bottom = random_box(90, 60)
        assert 0 <= left < right <= 90
        assert 0 <= top < bottom <= 60
        assert 0.6 < (right - left) / (bottom - top) < 1.6
        areas.append((right - left) * (bottom - top) / (90 * 60))
    assert min(areas) < 0.15
    assert max(areas) > 0.7
    assert middle_box(90, 64) == (17, 4, 73, 60)
    assert random_box(1, 100) == middle_box(1, 100)


def test_fashion_mnist_files(tmp_path):
    pixels = np.arange(2 * 28 * 28, dtype=np.uint32).astype(np.uint8)
    images = struct.pack(">4i", 2051, 2, 28, 28) + pixels.tobytes()
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(images))
    (tmp_path / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(struct.pack(">2i", 2049, 2) + bytes([7, 3])))
    x, y = fashion_mnist(tmp_path, "train").tensors
    assert y.tolist() == [7, 3]
    assert x.shape == (2, 1, 28, 28)
    torch.testing.assert_close(x.flatten() * 0.353 + 0.286, torch.from_numpy(pixels).float() / 255)


def test_what_is_made_has_the_layout_that_is_read(tmp_path):
    make_images(tmp_path)
    train, test, classes, colours = load(tmp_path, 32)
    assert (len(train), len(test), classes, colours) == (512, 128, 4, 3)
    assert {path.suffix for path, _ in train.files} == {".JPEG", ".png"}


def test_resnet_50_is_the_one_of_the_literature():
    with torch.device("meta"):
        model = ResNet((3, 4, 6, 3), 1000)
        features = model.features(torch.empty(2, 3, 224, 224))
    assert sum(p.numel() for p in model.parameters()) == 25_557_032
    assert [tuple(f.shape[1:]) for f in features] == [(256, 56, 56), (512, 28, 28), (1024, 14, 14), (2048, 7, 7)]


def test_the_vision_transformer_is_the_one_of_the_literature():
    with torch.device("meta"):
        model = VisionTransformer(1000)
        assert model(torch.empty(2, 3, 224, 224)).shape == (2, 1000)
    assert sum(p.numel() for p in model.parameters()) == 88_224_232
    with pytest.raises(SystemExit, match="28 pixels cannot be cut into patches of 8"):
        VisionTransformer(10, image_size=28, patch=8)


def test_the_vision_transformer_sees_where_a_patch_is():
    torch.manual_seed(0)
    model = VisionTransformer(3, image_size=8, patch=4, width=16, depth=2, heads=2)
    torch.nn.init.normal_(model.head.weight)
    x = torch.randn(1, 3, 8, 8)
    assert not torch.allclose(model(x), model(x.flip(-1)), atol=1e-4)
    first, second = (layer.linear1.weight for layer in model.layers.layers)
    assert not torch.equal(first, second)


def test_weight_decay_is_for_matrices():
    model = ResNet((1, 1), 5, width=4)
    decayed, spared = decayed_apart(model, 0.1)
    assert decayed["weight_decay"] == 0.1
    assert spared["weight_decay"] == 0
    assert {p.ndim for p in spared["params"]} == {1}
    assert len(decayed["params"]) + len(spared["params"]) == len(list(model.parameters()))
