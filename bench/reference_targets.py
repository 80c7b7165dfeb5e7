"""The reference document's target assignment: TensorFlow, eager, one image at a time, in a Python loop over the boxes.

It is compared with `fcos_lite.detector.targets.assign_targets`, in speed by the benchmarks and in its results by
tests/detector/test_targets.py.
"""
import tensorflow as tf

LEVELS = 4


def target_assignment(area):
    "The pyramid level and the stride of a box, by its area in pixels²."
    if area <= 4096.0: return 0, 4
    if area <= 16384.0: return 1, 8
    if area <= 65536.0: return 2, 16
    return 3, 32


def reference_targets(
    boxes, # (M, 4) xyxy, pixels; no padding
    labels, # (M,) class indices
    image_size=512, # pixels
    num_classes=1,
): # lists of one tensor per level: cls (H, W, classes), ltrb (H, W, 4) strides, centerness (H, W, 1)
    "Return what every location of one image has to learn."
    sides = [image_size // (4 << level) for level in range(LEVELS)]
    cls_targets = [tf.zeros((side, side, num_classes)) for side in sides]
    ltrb_targets = [tf.zeros((side, side, 4)) for side in sides]
    centerness_targets = [tf.zeros((side, side, 1)) for side in sides]
    assigned_areas = [tf.fill((side, side), float("inf")) for side in sides]

    for box, label in zip(tf.unstack(tf.cast(boxes, tf.float32)), labels):
        x_min, y_min, x_max, y_max = tf.unstack(box)
        box_area = (x_max - x_min) * (y_max - y_min)
        if box_area <= 0: continue
        level, stride = target_assignment(float(box_area))
        side = sides[level]

        x_grid, y_grid = tf.meshgrid(tf.range(side, dtype=tf.float32), tf.range(side, dtype=tf.float32))
        x_img, y_img = x_grid * stride + stride / 2, y_grid * stride + stride / 2
        in_box = (x_img > x_min) & (x_img < x_max) & (y_img > y_min) & (y_img < y_max)

        x_center, y_center = (x_min + x_max) / 2 / stride, (y_min + y_max) / 2 / stride
        radius_x = tf.maximum(1.0, (x_max - x_min) / stride)
        radius_y = tf.maximum(1.0, (y_max - y_min) / stride)
        rad = (tf.abs(x_grid - x_center) <= radius_x) & (tf.abs(y_grid - y_center) <= radius_y)

        final_mask = in_box & rad & (box_area < assigned_areas[level])
        mask = final_mask[..., None]
        assigned_areas[level] = tf.where(final_mask, box_area, assigned_areas[level])

        one_hot = tf.one_hot(int(label), num_classes)
        cls_targets[level] = tf.where(mask, one_hot, cls_targets[level])

        l, t = (x_img - x_min) / stride, (y_img - y_min) / stride
        r, b = (x_max - x_img) / stride, (y_max - y_img) / stride
        ltrb_targets[level] = tf.where(mask, tf.stack([l, t, r, b], axis=-1), ltrb_targets[level])

        horizontal = tf.minimum(l, r) / (tf.maximum(l, r) + 1e-6)
        vertical = tf.minimum(t, b) / (tf.maximum(t, b) + 1e-6)
        centerness = tf.sqrt(tf.where(final_mask, horizontal * vertical, 0.0))
        centerness_targets[level] = tf.where(mask, centerness[..., None], centerness_targets[level])
    return cls_targets, ltrb_targets, centerness_targets
