"""The reference's training loop, run as it reads: eagerly, one micro-batch after the other, from PNG records to a line.

The network is ours, so that only the loop is compared. What is the reference's: TFRecords with PNG images and ragged
boxes, two maps, a prefetch of one; targets in a Python loop over the boxes of each image; the three losses, level by
level; gradients gathered while a counter is below eight, else applied (which throws every ninth micro-batch away);
each tensor clipped by itself; two optimizers; a line after every step. Left out, in its favour: the loss scale, which
is for GPUs, and the augmentation of its images.
"""
import keras
import tensorflow as tf
from reference_targets import reference_targets

def floats(values): return tf.train.Feature(float_list=tf.train.FloatList(value=values))
def integers(values): return tf.train.Feature(int64_list=tf.train.Int64List(value=values))
def strings(values): return tf.train.Feature(bytes_list=tf.train.BytesList(value=values))

def write_records(path, examples):
    "Write letterboxed images as PNG, boxes flat and their row lengths, one record for each."
    with tf.io.TFRecordWriter(str(path)) as writer:
        for example in examples:
            rows = [[label, *box] for label, box in zip(example.labels.tolist(), example.boxes.tolist())]
            feature = {"image": strings([tf.io.encode_png(example.read()).numpy()]),
                       "boxes": floats([number for row in rows for number in row]),
                       "row_lengths": integers([len(row) for row in rows])}
            writer.write(tf.train.Example(features=tf.train.Features(feature=feature)).SerializeToString())

def parse(record):
    "Return the fields of a record."
    kinds = {"image": tf.io.FixedLenFeature([], tf.string), "boxes": tf.io.VarLenFeature(tf.float32),
             "row_lengths": tf.io.VarLenFeature(tf.int64)}
    return tf.io.parse_single_example(record, kinds)

def decode(fields):
    "Return an image in [0, 1], and its boxes as a ragged tensor: class, x_min, y_min, x_max, y_max."
    values, lengths = tf.sparse.to_dense(fields["boxes"]), tf.sparse.to_dense(fields["row_lengths"])
    image = tf.cast(tf.io.decode_png(fields["image"], channels=3), tf.float32) / 255.0
    return image, tf.RaggedTensor.from_row_lengths(values, lengths)

def read_records(path, batch_size):
    "Return endless batches."
    data = tf.data.TFRecordDataset(str(path)).repeat()
    return data.map(parse, num_parallel_calls=2).map(decode, num_parallel_calls=2).batch(batch_size).prefetch(1)

def focal_loss(targets, logits, alpha=0.25, gamma=2.0):
    bce, p = tf.nn.sigmoid_cross_entropy_with_logits(labels=targets, logits=logits), tf.sigmoid(logits)
    p_t, alpha_t = targets * p + (1 - targets) * (1 - p), targets * alpha + (1 - targets) * (1 - alpha)
    return tf.reduce_sum(alpha_t * (1 - p_t) ** gamma * bce)

def giou_loss(targets, distances):
    def area(d): return (d[:, 0] + d[:, 2]) * (d[:, 1] + d[:, 3])
    smaller, larger = tf.minimum(targets, distances), tf.maximum(targets, distances)
    intersection, enclosing = area(smaller), area(larger)
    union = area(targets) + area(distances) - intersection
    giou = intersection / (union + 1e-6) - (enclosing - union) / (enclosing + 1e-6)
    return tf.reduce_sum(1 - tf.clip_by_value(giou, -1.0, 1.0))

def reference_losses(outputs, boxes, image_size):
    "Return the losses of a batch: cls, ltrb, centerness; the outputs of all levels come in one row, finest first."
    cls = ltrb = centerness = positives = centerness_sum = 0.0
    for i in range(boxes.shape[0]):
        rows, first = boxes[i], 0
        if isinstance(rows, tf.RaggedTensor): rows = rows.to_tensor(shape=(None, 5))
        rows = tf.reshape(rows, (-1, 5))   # of an image without objects, no row
        for targets in zip(*reference_targets(rows[:, 1:], rows[:, 0], image_size)):
            count = targets[0].shape[0] * targets[0].shape[1]
            level = slice(first, first + count)
            cls_target, ltrb_target, centerness_target = (
                tf.reshape(target, shape) for target, shape in zip(targets, ((count, -1), (count, 4), (count,))))
            mask = tf.reduce_max(cls_target, axis=-1) > 0
            cls += focal_loss(cls_target, outputs["cls"][i, level])
            ltrb += giou_loss(tf.boolean_mask(ltrb_target, mask), tf.boolean_mask(outputs["ltrb"][i, level], mask))
            labels = tf.boolean_mask(centerness_target, mask)
            logits = tf.boolean_mask(outputs["centerness"][i, level], mask)
            centerness += tf.reduce_sum(tf.nn.sigmoid_cross_entropy_with_logits(labels=labels, logits=logits))
            positives += tf.reduce_sum(tf.cast(mask, tf.float32))
            centerness_sum += tf.reduce_sum(labels)
            first += count
    positives = tf.maximum(1.0, positives)
    return cls / positives, ltrb / positives, centerness / tf.maximum(1.0, centerness_sum + 1e-6)

class ReferenceLoop:
    "The loop; `run(steps)` goes on where it stopped."
    def __init__(self, model, records, batch_size, file):
        self.model, self.file, self.batches = model, file, iter(read_records(records, batch_size))
        self.optimizers = [keras.optimizers.AdamW(rate, weight_decay=5e-3) for rate in (1e-6, 1e-5)]
        self.variables = model.trainable_variables
        self.sums = [tf.Variable(tf.zeros(v.shape)) for v in self.variables]
        self.counter = self.steps = self.used = 0

    def run(self, steps):
        for _ in range(steps):
            images, boxes = next(self.batches)
            with tf.GradientTape() as tape:
                outputs = self.model.heads(self.model.fpn(images))
                cls, ltrb, centerness = reference_losses(outputs, boxes, images.shape[1])
                total = cls + ltrb + 1.0 * centerness
            gradients = tape.gradient(total, self.variables)
            if self.counter < 8:
                for gathered, gradient in zip(self.sums, gradients): gathered.assign_add(gradient)
                self.counter, self.used = self.counter + 1, self.used + 1
            else: self.apply()
            self.steps += 1
            losses = {"cls": cls, "ltrb": ltrb, "centerness": centerness, "total": total}
            text = " ".join(f"{name} {loss.numpy():.4f}" for name, loss in losses.items())
            print(f"step {self.steps} {text}", file=self.file, flush=True)

    def apply(self):
        """Apply the mean of what was gathered, each tensor clipped by itself, each part by its own optimizer.

        The gradient that has just been computed is thrown away."""
        fpn = {id(v) for v in self.model.fpn.trainable_variables}
        clipped = [tf.clip_by_norm(gathered / self.counter, 10.0) for gathered in self.sums]
        for optimizer, in_fpn in zip(self.optimizers, (True, False)):
            pairs = [(gradient, v) for gradient, v in zip(clipped, self.variables) if (id(v) in fpn) == in_fpn]
            optimizer.apply_gradients(pairs)
        for gathered in self.sums: gathered.assign(tf.zeros_like(gathered))
        self.counter = 0
