"""The document's training loop, run as it reads: eagerly, one micro-batch after the other, from PNG records to a printed line.

The network is ours, so that only the loop is compared. What is the document's: TFRecords with PNG pictures and ragged boxes, two maps, a prefetch of one; targets in a Python loop over the boxes of each
picture; the three losses, level by level; gradients gathered while a counter is below eight, else applied (which throws every ninth micro-batch away); each tensor clipped by itself; two optimizers; a line
after every step. Left out, in its favour: the loss scale, which is for GPUs, and the random changes of its pictures.
"""
import tensorflow as tf
import keras
from document_targets import document_targets

def write_records(path, examples):
    "Letterboxed pictures as PNG, boxes flat and their row lengths, one record for each."
    floats = lambda values: tf.train.Feature(float_list=tf.train.FloatList(value=values))
    with tf.io.TFRecordWriter(str(path)) as writer:
        for example in examples:
            rows = [[label, *box] for label, box in zip(example.labels.tolist(), example.boxes.tolist())]
            feature = {"image": tf.train.Feature(bytes_list=tf.train.BytesList(value=[tf.io.encode_png(example.read()).numpy()])),
                       "boxes": floats([number for row in rows for number in row]),
                       "row_lengths": tf.train.Feature(int64_list=tf.train.Int64List(value=[len(row) for row in rows]))}
            writer.write(tf.train.Example(features=tf.train.Features(feature=feature)).SerializeToString())

def parse(record):
    "The fields of a record."
    kinds = {"image": tf.io.FixedLenFeature([], tf.string), "boxes": tf.io.VarLenFeature(tf.float32), "row_lengths": tf.io.VarLenFeature(tf.int64)}
    return tf.io.parse_single_example(record, kinds)

def decode(fields):
    "A picture in [0, 1], and its boxes as a ragged tensor: class, x_min, y_min, x_max, y_max."
    boxes = tf.RaggedTensor.from_row_lengths(tf.sparse.to_dense(fields["boxes"]), tf.sparse.to_dense(fields["row_lengths"]))
    return tf.cast(tf.io.decode_png(fields["image"], channels=3), tf.float32) / 255.0, boxes

def read_records(path, batch_size):
    "Endless batches."
    data = tf.data.TFRecordDataset(str(path)).repeat()
    return data.map(parse, num_parallel_calls=2).map(decode, num_parallel_calls=2).batch(batch_size).prefetch(1)

def focal_loss(targets, logits, alpha=0.25, gamma=2.0):
    bce, p = tf.nn.sigmoid_cross_entropy_with_logits(labels=targets, logits=logits), tf.sigmoid(logits)
    p_t, alpha_t = targets * p + (1 - targets) * (1 - p), targets * alpha + (1 - targets) * (1 - alpha)
    return tf.reduce_sum(alpha_t * (1 - p_t) ** gamma * bce)

def giou_loss(targets, distances):
    area = lambda d: (d[:, 0] + d[:, 2]) * (d[:, 1] + d[:, 3])
    smaller, larger = tf.minimum(targets, distances), tf.maximum(targets, distances)
    intersection, enclosing = area(smaller), area(larger)
    union = area(targets) + area(distances) - intersection
    giou = intersection / (union + 1e-6) - (enclosing - union) / (enclosing + 1e-6)
    return tf.reduce_sum(1 - tf.clip_by_value(giou, -1.0, 1.0))

def document_losses(outputs, boxes, image_size):
    "Classification, distances and centerness of a batch; the outputs of all levels come in one row, finest first."
    cls = reg = ctr = positives = centers = 0.0
    for picture in range(boxes.shape[0]):
        rows, first = boxes[picture], 0
        rows = rows.to_tensor(shape=(None, 5)) if isinstance(rows, tf.RaggedTensor) else tf.reshape(rows, (-1, 5))      # of a picture without people, no row
        for cls_target, reg_target, ctr_target in zip(*document_targets(rows[:, 1:], rows[:, 0], image_size)):
            count = cls_target.shape[0] * cls_target.shape[1]
            part = slice(first, first + count)
            cls_target, reg_target, ctr_target = tf.reshape(cls_target, (count, -1)), tf.reshape(reg_target, (count, 4)), tf.reshape(ctr_target, (count,))
            mask = tf.reduce_max(cls_target, axis=-1) > 0
            cls += focal_loss(cls_target, outputs["cls"][picture, part])
            reg += giou_loss(tf.boolean_mask(reg_target, mask), tf.boolean_mask(outputs["ltrb"][picture, part], mask))
            center = tf.boolean_mask(ctr_target, mask)
            ctr += tf.reduce_sum(tf.nn.sigmoid_cross_entropy_with_logits(labels=center, logits=tf.boolean_mask(outputs["centerness"][picture, part], mask)))
            positives += tf.reduce_sum(tf.cast(mask, tf.float32))
            centers += tf.reduce_sum(center)
            first += count
    return cls / tf.maximum(1.0, positives), reg / tf.maximum(1.0, positives), ctr / tf.maximum(1.0, centers + 1e-6)

class DocumentLoop:
    "The loop; `run(steps)` goes on where it stopped."
    def __init__(self, model, records, batch_size, file):
        self.model, self.file, self.batches = model, file, iter(read_records(records, batch_size))
        self.bb_optimizer, self.heads_optimizer = (keras.optimizers.AdamW(rate, weight_decay=5e-3) for rate in (1e-6, 1e-5))
        self.variables = model.trainable_variables
        self.acc_grads = [tf.Variable(tf.zeros(v.shape)) for v in self.variables]
        self.counter = self.steps = self.used = 0

    def run(self, steps):
        for _ in range(steps):
            images, boxes = next(self.batches)
            with tf.GradientTape() as tape:
                outputs = self.model.heads(self.model.fpn(images))
                cls_loss, reg_loss, ctr_loss = document_losses(outputs, boxes, images.shape[1])
                total_loss = cls_loss + reg_loss + 1.0 * ctr_loss
            grads = tape.gradient(total_loss, self.variables)
            if self.counter < 8:
                for acc, grad in zip(self.acc_grads, grads): acc.assign_add(grad)
                self.counter, self.used = self.counter + 1, self.used + 1
            else: self.apply()
            self.steps += 1
            print(f"step {self.steps} cls {cls_loss.numpy():.4f} reg {reg_loss.numpy():.4f} ctr {ctr_loss.numpy():.4f} total {total_loss.numpy():.4f}", file=self.file, flush=True)

    def apply(self):
        "The mean of what was gathered, each tensor clipped by itself, each part by its optimizer; what has just been computed is thrown away."
        fpn = {id(v) for v in self.model.fpn.trainable_variables}
        clipped = [tf.clip_by_norm(acc / self.counter, 10.0) for acc in self.acc_grads]
        for optimizer, backbone in ((self.bb_optimizer, True), (self.heads_optimizer, False)):
            optimizer.apply_gradients([(grad, v) for grad, v in zip(clipped, self.variables) if (id(v) in fpn) == backbone])
        for acc in self.acc_grads: acc.assign(tf.zeros_like(acc))
        self.counter = 0
