"""What one image costs from camera to screen, in its parts, how many there are a second and how late they are.

The camera is simulated, 640 x 480 pixels and 30 frames a second. Prints one line of JSON.
"""
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
from fcos_lite.config import CAMERA_NMS, ModelConfig
from fcos_lite.data.letterbox import Letterbox, fit_inside
from fcos_lite.detect.camera import Camera
from fcos_lite.detect.viewer import draw_fps
from fcos_lite.detector.nms import decode, nms
from fcos_lite.scenes.scenes import World, draw_scene

TINY = ModelConfig(
    image_size=64, stem_filters=8, stem_groups=2, backbone_filters=(8, 8, 8, 8), backbone_blocks=(1, 1, 1, 1),
    backbone_groups=4, pyramid_channels=16, pyramid_groups=4, tower_depth=1, tower_channels=16, tower_groups=4)
BUFFERS = 4   # frames that wait in the driver, as many as OpenCV asks of Linux's

class SimulatedCamera:
    "Films at a rate of its own into a queue; when that is full, a frame is lost, as in a driver."
    def __init__(self, image, rate): # BGR; frames per second
        self.image, self.rate = image, rate
        self.queue, self.times, self.on = queue.Queue(BUFFERS), [], True
        threading.Thread(target=self.film, daemon=True).start()

    def film(self):
        while self.on:
            image = self.image.copy()
            image[0, 0] = len(self.times) // 200 % 200, len(self.times) % 200, 0    # its number, to be found again
            self.times.append(time.perf_counter())
            try: self.queue.put_nowait(image)
            except queue.Full: pass
            time.sleep(1 / self.rate)

    def read(self): return True, self.queue.get()
    def isOpened(self): return True
    def release(self): self.on = False

    def time_of(self, image): # RGB; when it was filmed
        return self.times[200 * int(image[0, 0, 2]) + int(image[0, 0, 1])]

def make_frame(): # (480, 640, 3) uint8 RGB, people in it
    world = World(size=480, min_height=140, max_height=400, max_people=3, empty_share=0)
    return np.ascontiguousarray(np.tile(draw_scene(3, world).image, (1, 2, 1))[:, :640])

def to_numpy(outputs): return {name: value.numpy() for name, value in outputs.items()}

def on_screen(detections): # the image as the viewer shows it
    return draw_fps(fit_inside(detections.draw(), 1280, 720, pad_value=None), 10, 0.1)

def measure_steps(model, frame, rounds):
    "Milliseconds of each step, medians, measured in turns; NMS takes the network's outputs for this frame."
    config, detections = model.config, model.detect(frame)
    letterbox = Letterbox.fit(frame.shape[1], frame.shape[0], config.image_size)
    image, coded = tf.constant(letterbox.apply(frame, config.pad_value)[None]), frame[..., ::-1].copy()
    network = tf.function(lambda image: model(image))
    suppress = tf.function(lambda outputs: nms(*decode(outputs, config.image_size, config.strides), CAMERA_NMS))
    outputs = network(image)
    steps = {
        "read": lambda: cv2.cvtColor(coded.copy(), cv2.COLOR_BGR2RGB),
        "letterbox": lambda: letterbox.apply(frame, config.pad_value),
        "network": lambda: to_numpy(network(image)),
        "decoding and NMS": lambda: to_numpy(suppress(outputs)),
        "draw and resize": lambda: on_screen(detections),
    }
    seconds = {name: [] for name in steps}
    for _ in range(rounds + 1):
        for name, step in steps.items():
            started = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - started)
    return {name: round(1000 * statistics.median(values[1:]), 2) for name, values in seconds.items()}

def measure_latency(model, frame, count, rate):
    "Seconds from filming to showing: through the newest frame, through a plain loop; images per second of the first."
    def delay(camera, image):
        on_screen(model.detect(image))
        return time.perf_counter() - camera.time_of(image)

    simulated = SimulatedCamera(frame[..., ::-1], rate)
    plain = [delay(simulated, cv2.cvtColor(simulated.read()[1], cv2.COLOR_BGR2RGB)) for _ in range(count + BUFFERS)]
    simulated.release()
    simulated = SimulatedCamera(frame[..., ::-1], rate)
    with Camera(0, opener=lambda _: simulated) as camera:
        started = time.perf_counter()
        newest = [delay(simulated, shown.image) for _, shown in zip(range(count), camera)]
        seconds = time.perf_counter() - started
    return newest, plain[BUFFERS:], count / seconds

def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=30, help="in one measurement (default: %(default)s)")
    parser.add_argument("--rate", type=float, default=30, help="frames per second of the camera (default: %(default)s)")
    parser.add_argument("--image-size", type=int, help="side of the input; the weights' own by default")
    parser.add_argument("--tiny", action="store_true", help="a tiny network, to rehearse")
    options = parser.parse_args()
    model = FCOS(TINY) if options.tiny else FCOS.from_preset("person")
    if options.image_size and not options.tiny: model = FCOS(replace(model.config, image_size=options.image_size))
    frame = make_frame()
    steps = measure_steps(model, frame, options.images)
    newest, plain, rate = measure_latency(model, frame, options.images, options.rate)
    def milliseconds(values, quantile): return round(1000 * float(np.quantile(values, quantile)), 1)
    print(json.dumps({
        "image_size": model.config.image_size, "people": len(model.detect(frame)), "milliseconds": steps,
        "frames_per_second": round(rate, 2), "latency_ms": milliseconds(newest, 0.5),
        "latency_95_ms": milliseconds(newest, 0.95), "plain_latency_ms": milliseconds(plain, 0.5),
        "latency_over_work": round(milliseconds(newest, 0.5) / sum(steps.values()), 2)}))

if __name__ == "__main__": main()
