"""Whatever way an image comes in, the same boxes come out, in its own pixels."""
import numpy as np
import pytest
from PIL import Image
from fcos_lite.config import NMS_PRESETS, NMSConfig
from fcos_lite.detect.video import Video
from fcos_lite.detector.model import FCOS
from fcos_lite.errors import InputError

def test_one_image_has_one_answer_whichever_way_it_comes_in(model, scene, folder, site):
    expected = model.detect(scene)
    assert len(expected) == 2
    singles = [folder / "a.png", str(folder / "a.png"), Image.fromarray(scene), f"{site}/a.png",
               f"{site}/a.png?size=large", Image.open(folder / "a.png")]
    lists = [[scene], (scene, scene), np.stack([scene, scene]), f"{folder}/*.png",
             [folder / "a.png", f"{site}/b.png", Image.fromarray(scene)]]
    results = [model.detect(given) for given in singles] + [one for given in lists for one in model.detect(given)]
    for detections in results:
        np.testing.assert_array_equal(detections.xyxy, expected.xyxy)
        np.testing.assert_array_equal(detections.image, scene)
    assert [len(model.detect(given)) for given in lists] == [1, 2, 2, 2, 3] and model.detect([]) == []

def test_boxes_are_in_the_pixels_of_the_image_that_was_given(model, scene):
    "The same image with every pixel four times is the same to the network, and its boxes are twice as large."
    twice = np.repeat(np.repeat(scene, 2, 0), 2, 1)
    np.testing.assert_allclose(model.detect(twice).xyxy, 2 * model.detect(scene).xyxy, atol=2e-2)

def test_an_image_lying_on_its_side_is_turned_upright(model, scene, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.rot90(scene)).save(tmp_path / "phone.png", exif=exif)
    for given in (tmp_path / "phone.png", Image.open(tmp_path / "phone.png")):
        np.testing.assert_array_equal(model.detect(given).image, scene)

@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_a_video_is_its_frames_one_by_one(model, folder, batch_size):
    frames = list(Video(folder / "walk.avi"))
    results = list(model.stream(folder / "walk.avi", batch_size=batch_size))
    assert [(r.index, round(r.time, 3), r.fps) for r in results] == [(k, k / 5, 5.0) for k in range(5)]
    assert {tuple(r.seconds) for r in results} == {("read", "letterbox", "network and NMS")}
    for frame, result in zip(frames, results):
        np.testing.assert_array_equal(result.xyxy, model.detect(frame.image).xyxy)

def test_a_list_is_refused_what_does_not_end(model, folder, site):
    for given, kind in ((folder / "walk.avi", "video"), ("camera:0", "camera"), (folder, "video"),
                        (f"{site}/walk.avi", "video"), ([f"{site}/walk.avi", folder / "a.png"], "video")):
        why = f"a {kind} has too many images for a list; write: for detections in model"
        with pytest.raises(InputError, match=why): model.detect(given)

def test_thresholds_by_name_are_the_presets(model, scene):
    for name, config in NMS_PRESETS.items():
        assert model.detect(scene, name).to_json() == model.detect(scene, config).to_json()
    assert len(model.detect(scene, NMSConfig(score=0.6))) == 1
    with pytest.raises(InputError, match="choose one of camera, reference, coco"): model.detect(scene, "strict")

def test_a_network_answers_alike_in_any_batch(tiny_run, scene):
    network = FCOS.from_preset(tiny_run)
    nms = NMSConfig(score=0.0, candidates=50)
    images = [np.roll(scene, 4 * step, axis=1) for step in range(3)]
    together = network.detect(images, nms)
    assert len(together[0]) > 3
    for image, detections in zip(images, together):
        alone = network.detect(image, nms)
        np.testing.assert_allclose(detections.score, alone.score, atol=1e-4)
        np.testing.assert_allclose(detections.xyxy, alone.xyxy, atol=2e-2)
