"""A model that needs no network, a folder of images and a video, and a server for them."""
import functools
import http.server
import threading
from types import SimpleNamespace
import numpy as np
import pytest
from fcos_lite.config import get_nms_config
from fcos_lite.detect.stream import detect, stream
from fcos_lite.detect.video import VideoWriter
from fcos_lite.scenes.scenes import World, draw_scene
from fcos_lite.visualize.drawing import save_image

class StandIn:
    "A model whose boxes tell what it was shown: their width is the brightness of their image."
    config = SimpleNamespace(image_size=64, pad_value=114, class_names=("person",))
    def __init__(self, nms=None): self.nms = nms
    def predictor(self, nms): return StandIn(get_nms_config(nms))
    def predict_on_batch(self, images):
        assert images.shape[1:] == (64, 64, 3) and images.dtype == np.uint8
        right = 10 + images.mean((1, 2, 3))[:, None] / 10
        places = np.tile(np.array([[2.0, 12, 0, 40], [8, 20, 0, 50], [5, 15, 0, 30]]), (len(images), 1, 1))
        places[..., 2] = places[..., 0] + right
        score = np.tile(np.float32([0.9, 0.5, 0.1]), (len(images), 1))
        return {"xyxy": places.astype(np.float32), "score": score, "label": np.zeros(score.shape, np.int32),
                "kept": score > self.nms.score}
    def detect(self, source, nms="camera", batch_size=8): return detect(self, source, nms, batch_size)
    def stream(self, source, nms="camera", batch_size=1, log=None): return stream(self, source, nms, batch_size, log)

@pytest.fixture(scope="session")
def model(): return StandIn()

@pytest.fixture(scope="session")
def scene(): # wider than high: the letterbox has something to do
    return draw_scene(2, World(size=64, min_height=20, max_height=56, empty_share=0)).image[:48].copy()

@pytest.fixture
def folder(tmp_path, scene):
    "Three images and a video of five frames."
    for name in ("b.png", "a.png", "c.PNG"): save_image(tmp_path / name, scene)
    with VideoWriter(tmp_path / "walk.avi", 5) as video:
        for step in range(5): video.write(np.roll(scene, 4 * step, axis=1))
    return tmp_path

@pytest.fixture
def site(folder):
    "An address where the folder is served."
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_): pass
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=folder))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()

@pytest.fixture
def command(model, monkeypatch):
    "The command, with a model that is there already."
    from fcos_lite.detect import __main__ as command
    from fcos_lite.detector.model import FCOS
    monkeypatch.setattr(FCOS, "from_preset", lambda name: model)
    return lambda *words: command.main([str(word) for word in words])
