"""COCO's annotations, RetinaNet, its anchors and losses, and the measure of what it finds."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from image_classification import ResNet
from object_detection import (
    BACKGROUND,
    IGNORED,
    Coco,
    RetinaNet,
    collate,
    corners,
    decode,
    detect,
    distinct,
    encode,
    focal_loss,
    loss_of,
    make_anchors,
    make_shapes,
    match,
    mean_average_precision,
    overlaps,
)
from PIL import Image


def annotation(image=7, category=3, bbox=(10, 5, 20, 10), **more):
    return {"id": 1, "image_id": image, "category_id": category, "bbox": list(bbox), **more}


def write(folder, annotations, **changes):
    """One image of 40 x 20 with these annotations, and one without any."""
    (folder / "annotations").mkdir(exist_ok=True)
    (folder / "train2017").mkdir(exist_ok=True)
    Image.new("L", (40, 20), 128).save(folder / "train2017" / "a.png")
    Image.new("RGB", (30, 30)).save(folder / "train2017" / "b.png")
    content = {
        "images": [
            {"id": 9, "file_name": "b.png", "width": 30, "height": 30},
            {"id": 7, "file_name": "a.png", "width": 40, "height": 20},
        ],
        "annotations": annotations,
        "categories": [{"id": 90, "name": "late"}, {"id": 3, "name": "early"}],
        **changes,
    }
    (folder / "annotations" / "instances_train2017.json").write_text(json.dumps(content))
    return folder


def test_boxes_are_scaled_with_the_image(tmp_path):
    crowd = annotation(iscrowd=1)
    outside = annotation(bbox=(50, 5, 10, 10))
    beyond = annotation(category=90, bbox=(30, -5, 20, 10))
    dataset = Coco(write(tmp_path, [annotation(), crowd, outside, beyond]), "train", 80, train=False)
    assert dataset.classes == ["early", "late"]
    assert len(dataset) == 2
    pixels, boxes, numbers = dataset[0]
    assert pixels.shape == (3, 80, 80)
    assert boxes.tolist() == [[20, 20, 60, 60], [60, 0, 80, 20]]
    assert numbers.tolist() == [0, 1]
    _, none, numbers = dataset[1]
    assert none.shape == (0, 4)
    assert numbers.shape == (0,)
    together = collate([dataset[0], dataset[1]])
    assert together[0].shape == (2, 3, 80, 80)
    assert [len(b) for b in together[1]] == [2, 0]


def test_boxes_are_mirrored_with_the_image(tmp_path):
    data = write(tmp_path, [annotation(bbox=(0, 5, 10, 10))])
    bright_on_the_left = Image.new("L", (40, 20))
    bright_on_the_left.paste(255, (0, 0, 10, 20))
    bright_on_the_left.save(data / "train2017" / "a.png")
    dataset = Coco(data, "train", 80, train=True)
    torch.manual_seed(0)
    seen = set()
    for _ in range(20):
        pixels, boxes, _ = dataset[0]
        mirrored = bool(pixels[0, 0, -1] > pixels[0, 0, 0])
        seen.add(mirrored)
        assert boxes.tolist() == ([[60, 20, 80, 60]] if mirrored else [[0, 20, 20, 60]])
    assert seen == {False, True}


def test_corners():
    assert corners([1, 2, 3, 4], 10, 10) == [1, 2, 4, 6]
    assert corners([-1, 2, 30, 4], 10, 5) == [0, 2, 10, 5]


@pytest.mark.parametrize(
    ("annotations", "changes", "complaint"),
    [
        ([{k: v for k, v in annotation().items() if k != "bbox"}], {}, "KeyError.*bbox"),
        ([annotation(image=8)], {}, "KeyError.*8"),
        ([annotation(category=4)], {}, "KeyError.*4"),
        ([annotation(bbox=(1, 2, 3))], {}, "ValueError"),
        ([annotation(bbox=("a", 2, 3, 4))], {}, "TypeError"),
        ([], {"images": [{"id": 1, "file_name": "a.png"}]}, "KeyError.*width"),
    ],
)
def test_annotations_that_are_not_coco_s_are_refused(tmp_path, annotations, changes, complaint):
    with pytest.raises(SystemExit, match=rf"instances_train2017.json is not as COCO's.*{complaint}"):
        Coco(write(tmp_path, annotations, **changes), "train", 80, train=True)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(SystemExit, match=r"must have one annotations/instances_val\*.json and one folder val\*"):
        Coco(write(tmp_path, []), "val", 80, train=False)


def test_what_is_made_can_be_read(tmp_path):
    make_shapes(tmp_path)
    for part, count in (("train", 256), ("val", 64)):
        dataset = Coco(tmp_path, part, 64, train=False)
        assert len(dataset) == count
        assert dataset.classes == ["rectangle", "ellipse", "triangle"]
        assert all(len(dataset[index][1]) == 2 for index in range(0, count, 16))


def test_the_network_has_nine_anchors_at_every_place_of_five_levels():
    with torch.device("meta"):
        scores, offsets, levels = RetinaNet(80)(torch.empty(2, 3, 800, 800))
    assert levels == [(100, 100), (50, 50), (25, 25), (13, 13), (7, 7)]
    anchors = make_anchors(levels)
    assert anchors.shape == (9 * (100**2 + 50**2 + 25**2 + 13**2 + 7**2), 4)
    assert scores.shape == (2, len(anchors), 80)
    assert offsets.shape == (2, len(anchors), 4)
    # The middle anchor of the second place of the first row.
    centre, sides = (anchors[:, :2] + anchors[:, 2:]) / 2, anchors[:, 2:] - anchors[:, :2]
    assert centre[9 + 4].tolist() == [12, 4]
    torch.testing.assert_close(sides[9 + 1], torch.tensor([32.0, 32.0]))
    assert centre[9 * 100].tolist() == [4, 12]
    area = sides.prod(1)
    torch.testing.assert_close(area[:9], torch.tensor([32.0**2 * 4 ** (k / 3) for k in (0, 0, 0, 1, 1, 1, 2, 2, 2)]))
    torch.testing.assert_close(sides[:3, 1] / sides[:3, 0], torch.tensor([0.5, 1, 2]))
    assert math.sqrt(area[-9]) == pytest.approx(512)


def test_the_output_is_in_the_order_of_the_anchors():
    """A network that copies its features to the output shows which place each row is from."""
    torch.manual_seed(0)
    model = RetinaNet(2, (1, 1, 1, 1), 2, 4, 0).eval()
    scores, _, levels = model(torch.randn(1, 3, 64, 64))
    seen = []
    model.scores.register_forward_hook(lambda module, inputs, output: seen.append(output))
    again, _, _ = model(torch.randn(1, 3, 64, 64))
    rows, columns = levels[0]
    assert seen[0].shape == (1, 18, rows, columns)
    for row, column, anchor in ((0, 0, 0), (1, 3, 5), (7, 7, 8)):
        expected = seen[0][0, 2 * anchor : 2 * anchor + 2, row, column]
        assert torch.equal(again[0, (row * columns + column) * 9 + anchor], expected)
    assert scores.sigmoid().mean().item() == pytest.approx(0.01, rel=0.5)


def test_overlaps():
    a = torch.tensor([[0.0, 0, 2, 2], [5, 5, 6, 6]])
    b = torch.tensor([[1.0, 1, 3, 3], [0, 0, 2, 2]])
    torch.testing.assert_close(overlaps(a, b), torch.tensor([[1 / 7, 1], [0, 0]]))


def test_matching():
    box = torch.tensor([[0.0, 0, 10, 10], [100, 100, 102, 102]])
    anchors = torch.tensor(
        [
            [0.0, 0, 10, 6],  # 0.6 of the first box
            [0, 0, 10, 4.5],
            [0, 0, 10, 3],
            [0, 0, 10, 10],
            [90, 90, 110, 110],  # 0.01 of the second, and nothing is closer to that
            [200, 200, 210, 210],
        ]
    )
    assert match(anchors, box).tolist() == [0, IGNORED, BACKGROUND, 0, 1, BACKGROUND]
    assert match(anchors, torch.empty(0, 4)).tolist() == [BACKGROUND] * 6


def test_offsets_lead_from_anchors_to_boxes():
    anchors = torch.tensor([[0.0, 0, 10, 20]])
    boxes = torch.tensor([[5.0, 10, 25, 20]])
    offsets = encode(boxes, anchors)
    torch.testing.assert_close(offsets, torch.tensor([[1.0, 0.25, math.log(2), math.log(0.5)]]))
    torch.testing.assert_close(decode(offsets, anchors), boxes)
    assert decode(torch.full((1, 4), 1e4), anchors).isfinite().all()


def test_focal_loss_follows_its_formula():
    torch.manual_seed(0)
    logits, targets = 3 * torch.randn(5, 4), (torch.rand(5, 4) < 0.3).float()
    expected = 0.0
    for x, y in zip(logits.flatten().tolist(), targets.flatten().tolist(), strict=True):
        p = 1 / (1 + math.exp(-x))
        p, alpha = (p, 0.25) if y else (1 - p, 0.75)
        expected -= alpha * (1 - p) ** 2 * math.log(p)
    assert focal_loss(logits, targets).item() == pytest.approx(expected, rel=1e-5)
    # Without the focus it is half the cross entropy.
    plain = torch.nn.functional.binary_cross_entropy_with_logits(logits, targets, reduction="sum")
    torch.testing.assert_close(focal_loss(logits, targets, 0.5, 0.0), plain / 2)


def test_the_loss_is_least_where_everything_is_right():
    levels = [(8, 8), (4, 4), (2, 2), (1, 1), (1, 1)]
    anchors = make_anchors(levels)
    box, number = torch.tensor([[10.0, 10, 44, 44]]), torch.tensor([1])
    found = match(anchors, box)
    scores, offsets = torch.full((1, len(anchors), 3), -20.0), torch.zeros(1, len(anchors), 4)
    scores[0, found == 0, 1] = 20.0
    offsets[0, found == 0] = encode(box.expand((found == 0).sum(), 4), anchors[found == 0])
    # What is neither object nor background may be anything.
    scores[0, found == IGNORED] = 20.0
    assert (found == IGNORED).any()
    assert loss_of((scores, offsets, levels), [box], [number]).item() < 1e-6
    assert loss_of((scores, offsets + 0.25, levels), [box], [number]).item() == pytest.approx(1, rel=1e-4)
    assert loss_of((scores, offsets, levels), [box], [number - 1]).item() > 1
    nothing = torch.empty(0, 4), torch.empty(0, dtype=torch.long)
    calm = torch.full_like(scores, -20.0)
    assert loss_of((calm, offsets, levels), [nothing[0]], [nothing[1]]).item() < 1e-6


def test_what_overlaps_a_better_one_of_its_class_is_dropped():
    boxes = torch.tensor([[0.0, 0, 10, 10], [1, 0, 11, 10], [1, 0, 11, 10], [50, 50, 60, 60]])
    scores, numbers = torch.tensor([0.6, 0.9, 0.5, 0.7]), torch.tensor([0, 0, 1, 0])
    assert distinct(boxes, scores, numbers).tolist() == [1, 3, 2]
    logits = torch.full((4, 2), -10.0)
    logits[range(4), numbers] = torch.logit(scores)
    found, sure, classes = detect(logits, encode(boxes, boxes), boxes, 55)
    assert classes.tolist() == [0, 0, 1]
    torch.testing.assert_close(sure, torch.tensor([0.9, 0.7, 0.5]))
    assert found[1].tolist() == [50, 50, 55, 55]


def test_mean_average_precision():
    truth, numbers = torch.tensor([[0.0, 0, 10, 10], [20, 20, 30, 30]]), torch.tensor([0, 0])

    def measure(*found, classes=1):
        boxes = torch.tensor([box for box, _ in found]).view(-1, 4)
        sure = torch.tensor([score for _, score in found])
        return mean_average_precision([((boxes, sure, torch.zeros(len(found))), truth, numbers)], classes)

    first, second, nowhere = [0.0, 0, 10, 10], [20.0, 20, 30, 30], [50.0, 50, 60, 60]
    assert measure((first, 0.9), (second, 0.8)) == 1
    # A class that no image has does not count.
    assert measure((first, 0.9), (second, 0.8), classes=2) == 1
    assert measure((nowhere, 0.9)) == measure() == 0
    # Recalls of 0, 0.01 ... 0.5 are reached, 51 of 101.
    assert measure((first, 0.9)) == pytest.approx(51 / 101)
    # Found twice is once wrong; the second object comes third.
    assert measure((first, 0.9), (first, 0.8), (second, 0.7)) == pytest.approx((51 + 50 * 2 / 3) / 101)
    # An overlap of 0.72 will do up to 0.7: five thresholds of ten.
    assert measure(([0.0, 0, 10, 7.2], 0.9), (second, 0.8)) == pytest.approx((5 + 5 * 51 / 101 / 2) / 10)


def test_a_given_backbone_is_used_and_its_normalizations_stay(tmp_path):
    torch.manual_seed(0)
    classifier = ResNet((1, 1, 1, 1), 7, width=4)
    for buffer in classifier.buffers():
        buffer.add_(1)
    # Other names, the same order.
    renamed = {f"layer{k}": value for k, value in enumerate(classifier.state_dict().values())}
    torch.save(renamed, tmp_path / "weights.pt")
    model = RetinaNet(3, (1, 1, 1, 1), 4, 8, 1)
    model.load_backbone(tmp_path / "weights.pt")
    x = torch.randn(2, 3, 64, 64)
    classifier.eval()
    before = [f.clone() for f in model.train().backbone.features(x)]
    for mine, theirs in zip(before, classifier.features(x), strict=True):
        torch.testing.assert_close(mine, theirs)
    assert all(np.array_equal(a, b) for a, b in zip(model.backbone.buffers(), classifier.buffers(), strict=True))
    fixed = [p for p in model.backbone.parameters() if not p.requires_grad]
    assert {p.ndim for p in fixed} == {1}
    with pytest.raises(SystemExit, match="does not hold the weights"):
        RetinaNet(3, (1, 1, 2, 1), 4, 8, 1).load_backbone(tmp_path / "weights.pt")
