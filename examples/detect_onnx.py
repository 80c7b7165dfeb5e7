"""Who is in a picture? An exported detector with ONNX Runtime, NumPy and Pillow alone: python detect_onnx.py FOLDER PICTURE"""
import json
import sys
from pathlib import Path
import numpy as np
from PIL import Image, ImageOps
import onnxruntime

def letterbox(image, size, grey):
    "The picture in the middle of a grey square (1, size, size, 3), and what leads back: shift and scale of left, top, right, bottom."
    scale = size / max(image.size)
    width, height = (max(1, round(side * scale)) for side in image.size)
    left, top = (size - width) // 2, (size - height) // 2
    square = np.full((1, size, size, 3), grey, np.uint8)
    square[0, top:top + height, left:left + width] = image.resize((width, height), Image.Resampling.BOX if scale < 1 else Image.Resampling.BILINEAR)
    return square, np.array([left, top] * 2), np.array([width / image.width, height / image.height] * 2)

folder, picture = Path(sys.argv[1]), sys.argv[2]
page = json.loads((folder / "model.json").read_text(encoding="utf-8"))
image = ImageOps.exif_transpose(Image.open(picture)).convert("RGB")
square, shift, scale = letterbox(image, page["image_size"], page["pad_value"])
session = onnxruntime.InferenceSession(str(folder / page["file"]), providers=["CPUExecutionProvider"])
found = dict(zip((output.name for output in session.get_outputs()), session.run(None, {"image": square})))
count = int(found["count"][0])
boxes = np.clip((found["boxes"][0, :count] - shift) / scale, 0, [*image.size] * 2)   # in the picture's own pixels
for box, score, label in zip(boxes, found["scores"][0], found["labels"][0]):
    print(page["class_names"][label], f"{score:.3f}", *(f"{side:.1f}" for side in box))
