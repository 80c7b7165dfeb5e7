"""Detect objects in an image with an exported detector, TensorFlow, NumPy and Pillow, without Keras.

python detect_saved_model.py FOLDER IMAGE
"""
import json
import sys
from pathlib import Path
import numpy as np
from PIL import Image, ImageOps
import tensorflow as tf

def letterbox(image, size, pad_value):
    "Return (1, size, size, 3) uint8, and the shift and scale of left, top, right, bottom that lead back."
    scale = size / max(image.size)
    width, height = (max(1, round(side * scale)) for side in image.size)
    left, top = (size - width) // 2, (size - height) // 2
    filter = Image.Resampling.BOX if scale < 1 else Image.Resampling.BILINEAR
    batch = np.full((1, size, size, 3), pad_value, np.uint8)
    batch[0, top:top + height, left:left + width] = image.resize((width, height), filter)
    return batch, np.array([left, top] * 2), np.array([width / image.width, height / image.height] * 2)

folder, path = Path(sys.argv[1]), sys.argv[2]
manifest = json.loads((folder / "model.json").read_text(encoding="utf-8"))
image = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
batch, shift, scale = letterbox(image, manifest["image_size"], manifest["pad_value"])
detector = tf.saved_model.load(str(folder / manifest["file"])).signatures["serving_default"]
outputs = {name: value.numpy() for name, value in detector(image=tf.constant(batch)).items()}
count = int(outputs["count"][0])
boxes = np.clip((outputs["boxes"][0, :count] - shift) / scale, 0, [*image.size] * 2)   # in the image's own pixels
for box, score, label in zip(boxes, outputs["scores"][0], outputs["labels"][0]):
    print(manifest["class_names"][label], f"{score:.3f}", *(f"{side:.1f}" for side in box))
