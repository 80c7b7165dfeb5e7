"""What one picture costs from camera to screen, in its parts, how many there are a second and how late they are, with a pretended camera of 640 x 480 pixels and 30 frames a second. Prints one line of JSON."""
import argparse
import json
import os
import queue
import statistics
import threading
import time
from dataclasses import replace

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
import cv2
import numpy as np
import tensorflow as tf
from fcos_lite import FCOS
from fcos_lite.detect.camera import Camera
from fcos_lite.config import CAMERA_NMS, ModelConfig
from fcos_lite.data.images import Letterbox
from fcos_lite.detector.nms import decode, nms
from fcos_lite.scenes.scenes import World, draw_scene
from fcos_lite.detect.viewer import fit_to_screen, draw_fps

TINY = ModelConfig(image_size=64, stem_filters=8, stem_groups=2, backbone_filters=(8, 8, 8, 8), backbone_blocks=(1, 1, 1, 1), backbone_groups=4, pyramid_channels=16, pyramid_groups=4,
               tower_depth=1, tower_channels=16, tower_groups=4)
BUFFERS = 4   # frames that wait in the driver, as many as OpenCV asks of Linux's

class PretendedCamera:
    "Films at a rate of its own into a queue; when that is full, a frame is lost, as in a driver."
    def __init__(self, picture, rate):
        self.picture, self.rate, self.queue, self.times, self.on = picture, rate, queue.Queue(BUFFERS), [], True
        threading.Thread(target=self.film, daemon=True).start()

    def film(self):
        while self.on:
            image = self.picture.copy()
            image[0, 0] = len(self.times) // 200 % 200, len(self.times) % 200, 0    # its number, to be found again
            self.times.append(time.perf_counter())
            try: self.queue.put_nowait(image)
            except queue.Full: pass
            time.sleep(1 / self.rate)

    def read(self): return True, self.queue.get()
    def isOpened(self): return True
    def release(self): self.on = False

    def filmed(self, image): # when, by the clock of the program; RGB
        return self.times[200 * int(image[0, 0, 2]) + int(image[0, 0, 1])]

def frame(): # (480, 640, 3) uint8 RGB, people in it
    world = World(size=480, min_height=140, max_height=400, max_people=3, empty_share=0)
    return np.ascontiguousarray(np.tile(draw_scene(3, world).image, (1, 2, 1))[:, :640])

def in_parts(model, picture, rounds):
    "Milliseconds of each step, medians, measured in turns; decoding and NMS take what the network says of this picture."
    size, fit = model.config.image_size, Letterbox.fit(picture.shape[1], picture.shape[0], model.config.image_size)
    bare, coded = tf.function(lambda image: model(image)), picture[..., ::-1].copy()
    square, t = fit.apply(picture, model.config.pad_value)[None], CAMERA_NMS
    after = tf.function(lambda outputs: nms(*decode(outputs, size, model.config.strides), t.iou, t.score, t.max_per_class, t.candidates))
    outputs = bare(tf.constant(square))
    steps = {"read": lambda: cv2.cvtColor(coded.copy(), cv2.COLOR_BGR2RGB), "letterbox": lambda: fit.apply(picture, model.config.pad_value),
             "network": lambda: {name: value.numpy() for name, value in bare(tf.constant(square)).items()}, "decoding and NMS": lambda: {name: value.numpy() for name, value in after(outputs).items()},
             "draw and resize": lambda: draw_fps(fit_to_screen(result.draw(), 1280, 720), 10, 0.1)}
    result, rows = model.detect(picture), []
    for _ in range(rounds + 1):
        row = []
        for step in steps.values():
            started = time.perf_counter()
            step()
            row.append(1000 * (time.perf_counter() - started))
        rows.append(row)
    took = dict(zip(steps, (statistics.median(column) for column in list(zip(*rows[1:])))))
    return {name: round(value, 2) for name, value in took.items()}

def shown(model, image): # when it is on the screen
    draw_fps(fit_to_screen(model.detect(image).draw(), 1280, 720), 10, 0.1)
    return time.perf_counter()

def latency(model, picture, pictures, rate):
    "Seconds between the filming and the showing of each picture, through the newest frame and through a plain loop; pictures a second of the first."
    plain = PretendedCamera(picture[..., ::-1], rate)
    late_plainly = []
    for _ in range(pictures + BUFFERS):
        image = cv2.cvtColor(plain.read()[1], cv2.COLOR_BGR2RGB)
        late_plainly.append(shown(model, image) - plain.filmed(image))
    plain.release()
    pretended, late = PretendedCamera(picture[..., ::-1], rate), []
    with Camera(0, opener=lambda _: pretended) as camera:
        started = time.perf_counter()
        for _, one in zip(range(pictures), camera): late.append(shown(model, one.image) - pretended.filmed(one.image))
        taken = time.perf_counter() - started
    return late, late_plainly[BUFFERS:], pictures / taken

def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pictures", type=int, default=30, help="pictures in one measurement (default: %(default)s)")
    parser.add_argument("--rate", type=float, default=30, help="frames a second of the camera (default: %(default)s)")
    parser.add_argument("--image-size", type=int, help="side of the square; the weights' own by default")
    parser.add_argument("--tiny", action="store_true", help="a tiny network, to rehearse")
    a = parser.parse_args()
    model = FCOS(TINY) if a.tiny else FCOS.from_preset("person")
    if a.image_size and not a.tiny: model = FCOS(replace(model.config, image_size=a.image_size))
    picture = frame()
    parts = in_parts(model, picture, a.pictures)
    late, plainly, rate = latency(model, picture, a.pictures, a.rate)
    milliseconds = lambda values, share: round(1000 * float(np.quantile(values, share)), 1)
    print(json.dumps({"image_size": model.config.image_size, "people": len(model.detect(picture)), "milliseconds": parts, "frames_per_second": round(rate, 2), "latency_ms": milliseconds(late, 0.5),
                      "latency_95_ms": milliseconds(late, 0.95), "plain_latency_ms": milliseconds(plainly, 0.5), "latency_over_work": round(float(np.median(late)) * 1000 / sum(parts.values()), 2)}))

if __name__ == "__main__": main()
