"""Flip, brightness, noise, boxes with them, on the device."""
import keras
from keras import layers, ops, random

class Augment(layers.Layer):
    "Random changes of a batch of pictures (B, S, S, 3) in [0, 1] and of its boxes (B, M, 4)."
    def __init__(self, flip=0.5, brightness=0.1, noise=0.01, probability=0.5, seed=0, **kwargs):
        super().__init__(**kwargs)
        self.flip, self.brightness, self.noise, self.probability = flip, brightness, noise, probability
        self.generator = random.SeedGenerator(seed)
    def happens(self, batch, probability):
        return random.uniform((batch,), seed=self.generator) < probability
    def call(self, image, boxes):
        batch, size = ops.shape(image)[0], image.shape[2]
        if self.flip:
            image, boxes = flip(image, boxes, self.happens(batch, self.flip))
        if self.brightness:
            shift = random.uniform((batch, 1, 1, 1), -self.brightness, self.brightness, seed=self.generator)
            image = image + ops.where(self.happens(batch, self.probability)[:, None, None, None], shift, 0)
        if self.noise:
            noise = random.normal(ops.shape(image), stddev=self.noise, seed=self.generator)
            image = image + ops.where(self.happens(batch, self.probability)[:, None, None, None], noise, 0)
        return ops.clip(image, 0, 1), boxes

def flip(image, boxes, mirrored):
    "Mirror the pictures for which `mirrored` (B,) is true, boxes with them."
    size = image.shape[2]
    image = ops.where(mirrored[:, None, None, None], ops.flip(image, axis=2), image)
    left, top, right, bottom = ops.unstack(boxes, 4, axis=-1)
    other = ops.stack([size - right, top, size - left, bottom], axis=-1)
    return image, ops.where(mirrored[:, None, None], other, boxes)
