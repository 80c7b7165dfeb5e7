"""Boxes lie on the pixels that their numbers say; texts stay in the image and can be read."""
import numpy as np
import pytest
from PIL import Image
from fcos_lite.errors import InputError
from fcos_lite.visualize.drawing import (
    CROWD, PALETTE, _luminance, _paint_frame, draw_boxes, rgb, save_image, text_color, text_patch, tile_images,
    visible_boxes)

def painted(box, thickness=1): # (12, 12) of 0 and 1
    canvas = np.zeros((12, 12, 3), np.uint8)
    _paint_frame(canvas, box, (1, 1, 1), thickness)
    return canvas[..., 0]

def test_a_frame_lies_inside_its_box():
    "A box (2, 3, 8, 9) covers columns 2 to 7 and rows 3 to 8; across the border it loses its far part."
    frame = painted((2, 3, 8, 9))
    assert np.flatnonzero(frame.any(0)).tolist() == list(range(2, 8))
    assert np.flatnonzero(frame.any(1)).tolist() == list(range(3, 9))
    assert frame.sum() == 6 * 6 - 4 * 4 and painted((-5, -5, 3, 3)).sum() == 3 + 2
    assert painted((-9, -9, -2, -2)).sum() == painted((20, 20, 30, 30)).sum() == 0
    assert painted((4, 4, 6, 6), thickness=5).sum() == 4

def test_colours_can_be_read():
    def contrast(a, b):
        darker, lighter = sorted((_luminance(a), _luminance(b)))
        return (lighter + 0.05) / (darker + 0.05)
    assert contrast("#000000", "#FFFFFF") == pytest.approx(21) and len(set(PALETTE)) == 8
    assert all(contrast(color, text_color(color)) > 4.5 for color in PALETTE)   # what WCAG asks of body text
    assert rgb("#FF0080") == (255, 0, 128)

def test_labels_choose_colours():
    colors = [color for _, color, _ in visible_boxes(np.zeros((5, 4)), [0, 9, -2, -3, -1], None)]
    assert colors == [PALETTE[0], PALETTE[1], CROWD, CROWD]
    assert visible_boxes([[0, 0, np.nan, 1]], None, None) == visible_boxes(None, None, None) == []
    with pytest.raises(InputError, match="3 boxes, 1 labels"): visible_boxes(np.zeros((3, 4)), [0], None)

def test_texts_stay_in_the_image():
    wide, narrow = text_patch("person 0.93", 12, PALETTE[0]), text_patch("dog", 12, PALETTE[0])
    assert wide.shape[0] == narrow.shape[0] and wide.shape[1] > 2 * narrow.shape[1]
    assert tuple(wide[0, 0]) == rgb(PALETTE[0]) and (wide == 255).all(-1).any()
    corners = [[0, 0, 40, 40], [90, 0, 128, 40], [0, 100, 40, 128], [100, 100, 300, 300], [-50, 50, -9, 60]]
    for shape in ((128, 128, 3), (5, 3, 3)):   # the second is smaller than a text
        assert draw_boxes(np.zeros(shape, np.uint8), corners, texts=["person"] * 5).shape == shape

def test_drawing_leaves_the_image_as_it_was():
    image = np.zeros((12, 12, 3), np.uint8)
    assert draw_boxes(image, [[2, 3, 8, 9]]).any() and not image.any()
    np.testing.assert_array_equal(draw_boxes(image, np.zeros((0, 4))), image)
    with pytest.raises(InputError, match="height, width, 3"): draw_boxes(np.zeros((4, 4), np.uint8), [])

def test_images_are_tiled_in_rows():
    images = [np.full((2, 3, 3), value, np.uint8) for value in (10, 20, 30)]
    rows = [[10, 10, 10, 255, 20, 20, 20]] * 2 + [[255] * 7] + [[30, 30, 30, 255, 255, 255, 255]] * 2
    assert tile_images(images, columns=2, gap=1)[..., 0].tolist() == rows
    np.testing.assert_array_equal(tile_images(images[:1]), images[0])
    for wrong in ([], [np.zeros((2, 2, 3)), np.zeros((3, 3, 3))]):
        with pytest.raises(InputError, match="one size"): tile_images(wrong)

def test_an_image_is_written_by_its_suffix(tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (8, 9, 3), dtype=np.uint8)
    save_image(tmp_path / "new" / "a.PNG", image)
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "new" / "a.PNG")), image)
    for suffix, kind in ((".jpg", "JPEG"), (".webp", "WEBP")):
        save_image(tmp_path / f"a{suffix}", image)
        assert Image.open(tmp_path / f"a{suffix}").format == kind
    (tmp_path / "file").touch()
    for name in ("a.doc", "a", "file/a.png"):
        with pytest.raises(InputError, match="cannot be written"): save_image(tmp_path / name, image)
    assert not list(tmp_path.rglob(".*"))
