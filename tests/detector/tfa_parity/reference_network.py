"""The network of the reference document, written from its text for TensorFlow 2.15 and TensorFlow Addons 0.23.

Nothing is imported from fcos_lite: it is written independently. It prints the versions and the reference's table of
parameters; given weights and images, it also writes what the network says about them.

    python reference_network.py [--weights weights.npz --input images.npy --output outputs.npz]
"""
import argparse
import warnings

import numpy as np
import tensorflow as tf

with warnings.catch_warnings():  # of its end of life
    warnings.simplefilter("ignore")
    import tensorflow_addons as tfa

layers = tf.keras.layers


class FPN:
    "Backbone and `FPN_generator`; keeps its layers in the order in which the text names them."

    def __init__(self):
        self.layers = []

    def keep(self, layer):
        self.layers.append(layer)
        return layer

    def conv(self, x, filters, kernel, strides=1):
        return self.keep(layers.Conv2D(filters, kernel, strides=strides, padding="same", use_bias=False))(x)

    def norm(self, x, groups):
        return self.keep(tfa.layers.GroupNormalization(groups=groups, axis=-1))(x)

    def bottleneck(self, inputs, filters, stride=1):
        x = layers.ELU()(self.norm(self.conv(inputs, filters, 1, stride), 32))
        x = layers.ELU()(self.norm(self.conv(x, filters, 3), 32))
        x = self.conv(x, filters * 2, 1)
        if stride > 1 or inputs.shape[-1] != filters * 2:
            inputs = self.conv(inputs, filters * 2, 1, stride)
        x = layers.ELU()(self.norm(layers.add([x, inputs]), 32))
        return layers.ELU()(self.norm(self.conv(x, filters * 2, 3), 32))

    def backbone(self, image):
        c1 = layers.ELU()(self.norm(self.conv(image, 32, 5, 2), 16))
        c1 = layers.MaxPooling2D(pool_size=2, strides=2)(c1)
        c2 = self.bottleneck(self.bottleneck(c1, 32), 32)
        c3 = self.bottleneck(self.bottleneck(c2, 64, 2), 64)
        c4 = self.bottleneck(c3, 128, 2)
        c5 = self.bottleneck(c4, 128, 2)
        return c2, c3, c4, c5

    def generator(self, maps):
        pyramid, merged = [], None
        for c in maps[::-1]:
            p = layers.LeakyReLU(alpha=0.01)(self.norm(self.conv(c, 128, 1), 32))
            if merged is not None:
                p = layers.add([p, layers.UpSampling2D(2)(merged)])
                p = layers.LeakyReLU(alpha=0.01)(self.norm(p, 32))
            merged = p
            pyramid.append(layers.LeakyReLU(alpha=0.01)(self.norm(self.conv(p, 128, 3), 32)))
        return pyramid[::-1]

    def model(self, image_size):
        image = layers.Input((image_size, image_size, 3))
        return tf.keras.Model(image, self.generator(self.backbone(image)), name="FPN")


def create_head_tower(fill=64):
    tower = tf.keras.Sequential()
    for _ in range(4):
        tower.add(layers.Conv2D(fill, 3, padding="same", use_bias=False))
        tower.add(tfa.layers.GroupNormalization(groups=16, axis=-1))
        tower.add(layers.Activation(tf.keras.activations.swish))
    return tower


def head(filters, bias, name):
    return layers.Conv2D(filters, 1, activation=None, bias_initializer=tf.constant_initializer(bias), name=name)


class FCOSModel(tf.keras.Model):
    def __init__(self, image_size, num_classes=1):
        super().__init__()
        fpn = FPN()
        self.fpn = fpn.model(image_size)
        self.cls_tower = create_head_tower()
        self.reg_tower = create_head_tower()
        self.cls_head = head(num_classes, -np.log((1 - 0.05) / 0.05), "Classification")
        self.reg_head = head(4, -np.log(100), "Regression")
        self.ctr_head = head(1, -2.0, "Centerness")
        start = tf.constant_initializer(0.1)
        self.scale = [self.add_weight(f"scale_{level}", (), initializer=start) for level in range(4)]
        self(layers.Input((image_size, image_size, 3)))
        heads = [self.cls_tower, self.reg_tower, self.cls_head, self.reg_head, self.ctr_head]
        self.in_order = [weight for layer in fpn.layers + heads for weight in layer.weights] + self.scale

    def call(self, image):
        cls_outputs, reg_outputs, ctr_outputs = [], [], []
        for level, f in enumerate(self.fpn(image)):
            cls, reg = self.cls_tower(f), self.reg_tower(f)
            cls_outputs.append(self.cls_head(cls))
            reg_outputs.append(tf.exp(self.reg_head(reg) * self.scale[level]))
            ctr_outputs.append(self.ctr_head(cls))
        return cls_outputs, reg_outputs, ctr_outputs

    def load(self, values):
        "Takes weights in the text's order: backbone, pyramid from P5 down, towers, heads, scales."
        wanted, given = [tuple(w.shape) for w in self.in_order], [v.shape for v in values]
        for place, (want, have) in enumerate(zip(wanted, given)):
            if want != have:
                name = self.in_order[place].name
                raise SystemExit(f"weight {place}, {name}: the reference's has shape {want}, the one given {have}")
        if len(wanted) != len(given):
            raise SystemExit(f"the reference's network has {len(wanted)} weights; {len(given)} were given")
        for weight, value in zip(self.in_order, values):
            weight.assign(value)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", help="npz: the weights, in order, named so that sorting keeps it")
    parser.add_argument("--input", help="npy: (B, S, S, 3) images, 0..255")
    parser.add_argument("--output", help="npz, written: cls_P2 .. ctr_P5, (B, S/stride, S/stride, channels)")
    arguments = parser.parse_args()

    print("tensorflow", tf.__version__)
    print("tensorflow-addons", tfa.__version__)
    FCOSModel(512).summary()
    if arguments.weights is None:
        return

    images, weights = np.load(arguments.input), np.load(arguments.weights)
    tf.keras.backend.clear_session()
    model = FCOSModel(images.shape[1])
    model.load([weights[name] for name in sorted(weights.files)])
    outputs = model(tf.constant(images, tf.float32) / 255.0)
    named = {f"{kind}_P{level}": m.numpy() for kind, maps in zip(("cls", "reg", "ctr"), outputs)
             for level, m in enumerate(maps, start=2)}
    np.savez(arguments.output, **named)


if __name__ == "__main__":
    main()
