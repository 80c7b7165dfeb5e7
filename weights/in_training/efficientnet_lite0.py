"""EfficientNet-Lite0 (Liu 2020) as a Keras backbone, with what it learned on ImageNet.

The published weights travel as a file that PyTorch pickled. A pickle may run any code, so none
is trusted here: the file must have the SHA-256 that we know, and the one unpickler that reads it
knows two functions and the names of storages, and refuses every other word.

The network is MobileNetV2's idea without ornaments: blocks that widen, look around channel by
channel and narrow again; ReLU6, no squeeze-and-excitation. Its batch normalisations keep the
statistics they came with; each is then one multiplication and one sum, and `ConvNorm` carries out
the multiplication in the kernel, where there is far less to multiply than in the map.

    python lite0.py efficientnet-lite0-57934424.pth lite0.weights.h5
"""
import collections
import hashlib
import io
import pickle
import sys
from pathlib import Path

import h5py
import keras
import numpy as np
from keras import layers, ops

from fcos_lite.config import InputError, check

SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
EPSILON = 1e-3  # added to every variance
BLOCKS = (  # expand, channels, repeats, stride, kernel
    (1, 16, 1, 1, 3), (6, 24, 2, 2, 3), (6, 40, 2, 2, 5), (6, 80, 3, 2, 3),
    (6, 112, 3, 1, 5), (6, 192, 4, 2, 5), (6, 320, 1, 1, 3),
)
STEM, HEAD = 32, 1280  # channels of the first and of the last convolution

# --- the file that PyTorch wrote

MAGIC = 0x1950A86A20F9469CFC6C  # first number of the files that torch.save wrote before 1.6
PROTOCOL = 1001                 # the second one
DTYPES = {"FloatStorage": "<f4", "LongStorage": "<i8"}  # what a storage's bytes are


class Storage:
    "Numbers in a row that tensors look at; filled once the pickle has been read."
    def __init__(self, dtype, count): # of numpy; numbers
        self.dtype, self.count, self.numbers = np.dtype(dtype), count, None


class Tensor:
    "A view of a storage: where it begins, its shape, and how far apart neighbours lie."
    def __init__(self, storage, offset, shape, strides, *rest): # rest: autograd's, means nothing
        check(isinstance(storage, Storage) and len(shape) == len(strides), "not a torch tensor")
        self.storage, self.offset = storage, offset
        self.shape, self.strides = tuple(shape), tuple(strides)

    def array(self):
        "A copy of the numbers, row by row, whatever the order they are stored in."
        numbers = self.storage.numbers[self.offset:]
        reach = 1 + sum((n - 1) * step for n, step in zip(self.shape, self.strides))
        inside = all(n >= 1 for n in self.shape) and min(self.strides, default=0) >= 0
        check(self.offset >= 0 and inside and reach <= len(numbers),
              f"a tensor of {self.shape} reaches past the end of its storage")
        strides = [step * numbers.itemsize for step in self.strides]
        return np.lib.stride_tricks.as_strided(numbers, self.shape, strides).copy()


class Reader(pickle.Unpickler):
    "Unpickles tensors by name, and nothing else: no other class or function can be called."
    def __init__(self, file):
        super().__init__(file)
        self.storages = {}

    def find_class(self, module, name):
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"): return Tensor
        if (module, name) == ("collections", "OrderedDict"): return collections.OrderedDict
        if module == "torch" and name in DTYPES: return name  # a word, not a class
        raise InputError(f"the file asks for {module}.{name}, and only tensors are read; refused")

    def persistent_load(self, key):
        known = isinstance(key, tuple) and len(key) == 6 and key[0] == "storage"
        check(known and key[1] in DTYPES and key[5] is None, f"unknown storage {key!r}; refused")
        _, kind, name, _, count, _ = key
        return self.storages.setdefault(name, Storage(DTYPES[kind], count))


def read_torch_checkpoint(
    path,          # of a file that torch.save wrote before PyTorch 1.6 (which made zip files)
    sha256=SHA256, # that it must have; None: any
): # {name: numpy array}
    "The arrays of a state_dict, without PyTorch; raises `InputError` for whatever is not one."
    data = Path(path).read_bytes() if Path(path).is_file() else None
    check(data is not None, f"{path}: no such file")
    found = hashlib.sha256(data).hexdigest()
    check(sha256 in (None, found), f"{path}: damaged or another file, for its SHA-256 is {found} "
                                   f"and not {sha256}; fetch it again")
    with io.BytesIO(data) as file:  # not the file once more, which may be another by now
        try:
            head = [Reader(file).load() for _ in range(3)]
            check(head[:2] == [MAGIC, PROTOCOL], "not one that torch.save wrote before 1.6")
            check(head[2].get("little_endian") is True, "its numbers are not little-endian")
            body = Reader(file)
            tensors, order = body.load(), Reader(file).load()
            check(sorted(order) == sorted(body.storages), "its storages are not those it names")
            for name in order: fill(body.storages[name], file)
            check(isinstance(tensors, dict), "no dictionary of tensors")
            named = {name: value for name, value in tensors.items() if isinstance(value, Tensor)}
            check(len(named) == len(tensors), "not everything in it is a tensor")
            return {name: tensor.array() for name, tensor in named.items()}
        except InputError as error: raise InputError(f"{path}: {error}") from None
        except Exception as error:  # a pickle that is none can fail in any way
            raise InputError(f"{path}: no weights that torch.save wrote ({error!r})") from None


def fill(storage, file): # Storage; open where its numbers begin
    "Read a storage's numbers: their count in 8 bytes, then they themselves."
    count = int.from_bytes(file.read(8), "little")
    check(count == storage.count, f"a storage of {count} numbers where {storage.count} belong")
    data = file.read(count * storage.dtype.itemsize)
    check(len(data) == count * storage.dtype.itemsize, "it ends too early")
    storage.numbers = np.frombuffer(data, storage.dtype)


# --- the network

ARRAYS = "kernel", "gamma", "beta", "mean", "variance"  # of a `ConvNorm`, in the order of its file


class Normed:
    "What makes a convolution one with the batch normalisation after it, whose statistics stay."
    def __init__(self, *arguments, still=(), **kwargs): # still: which of `ARRAYS` never learn
        super().__init__(*arguments, use_bias=False, padding="same", **kwargs)
        self.still = {*still, "mean", "variance"}

    def build(self, input_shape):
        super().build(input_shape)
        if "kernel" in self.still: self.stop(self.kernel)
        count = self.kernel.shape[2] if self.channelwise else self.kernel.shape[3]
        for name, start in zip(ARRAYS[1:], ("ones", "zeros", "zeros", "ones")):
            said = dict(shape=(count,), initializer=start, trainable=name not in self.still)
            setattr(self, name, self.add_weight(name=name, **said))

    def stop(self, array):
        "From now on an array counts as one that cannot learn, whatever `trainable` is set to."
        self._trainable_variables.remove(array)
        self._non_trainable_variables.append(array)
        array.trainable = False

    def call(self, x):
        factor = self.gamma * ops.rsqrt(self.variance + EPSILON)
        convolve = ops.depthwise_conv if self.channelwise else ops.conv
        kernel = self.kernel * (factor[:, None] if self.channelwise else factor)
        x = convolve(x, kernel, strides=self.strides, padding="same", data_format="channels_last")
        return x + (self.beta - self.mean * factor)

    def save_own_variables(self, store):
        for name in ARRAYS: store[name] = getattr(self, name)

    def load_own_variables(self, store):
        for name in ARRAYS: getattr(self, name).assign(store[name])


class ConvNorm(Normed, layers.Conv2D):
    "Convolution and batch normalisation."
    channelwise = False


class DepthwiseNorm(Normed, layers.DepthwiseConv2D):
    "The same with a kernel for each channel."
    channelwise = True


def conv_norm(
    x,       # (B, H, W, C)
    filters, # channels; None: one kernel a channel (depthwise)
    size,    # of the kernel
    stride,
    name,    # of the layers, before their kind
    still,   # which of `ARRAYS` never learn
    clipped=True, # by ReLU6
): # (B, H / stride, W / stride, filters or C)
    "Convolution, batch normalisation, ReLU6."
    if filters: layer = ConvNorm(filters, size, strides=stride, still=still, name=f"{name}_conv")
    else: layer = DepthwiseNorm(size, strides=stride, still=still, name=f"{name}_conv")
    return layers.ReLU(6, name=f"{name}_relu6")(layer(x)) if clipped else layer(x)


def block(
    x,
    expand, filters, size, stride, # as in `BLOCKS`
    name,
    still,     # which of `ARRAYS` never learn
    depthwise, # the same of the kernels that look around
):
    "Widen, look around channel by channel, narrow; add the input where it has the same shape."
    y = x
    if expand > 1: y = conv_norm(y, expand * x.shape[-1], 1, 1, f"{name}_expand", still)
    y = conv_norm(y, None, size, stride, f"{name}_depthwise", depthwise)
    y = conv_norm(y, filters, 1, 1, f"{name}_project", still, clipped=False)
    same = stride == 1 and x.shape[-1] == filters
    return layers.Add(name=f"{name}_add")([y, x]) if same else y


def names(): # yields row, name, expand, filters, size, stride
    "Every block: block2_1 is the first of the second row."
    for row, (expand, filters, repeats, stride, size) in enumerate(BLOCKS, 1):
        for i in range(1, repeats + 1):
            yield row, f"block{row}_{i}", expand, filters, size, stride if i == 1 else 1


def efficientnet_lite0(
    size=224,     # of the picture's side, a multiple of 32
    classes=None, # 1000: with the classifier; None: the backbone alone
    still_rows=0, # the stem and so many rows of `BLOCKS` never learn; 0: all of them do
    still_depthwise=False, # whether kernels that look around never learn (their shifts still do)
): # functional keras.Model of pictures (B, size, size, 3) in [0, 1]
    "EfficientNet-Lite0, drawn at random. What stands still needs no backward pass."
    nearest = max(32, round(size / 32) * 32)
    check(size > 0 and size % 32 == 0,
          f"size {size}: the network halves its picture five times, so the side must be "
          f"a multiple of 32; the nearest is {nearest}")
    image = keras.Input((size, size, 3), name="image")
    x = layers.Rescaling(255 / 128, -127 / 128, name="units")(image)
    x = conv_norm(x, STEM, 3, 2, "stem", ARRAYS if still_rows else ())
    for row, name, *numbers in names():
        still = ARRAYS if row <= still_rows else ()
        around = still or (("kernel", "gamma") if still_depthwise else ())
        x = block(x, *numbers, name, still, around)
    if classes:
        x = conv_norm(x, HEAD, 1, 1, "head", ())
        x = layers.GlobalAveragePooling2D(name="head_pool")(x)
        x = layers.Dense(classes, name="head_classes")(x)
    return keras.Model(image, x, name="efficientnet_lite0")


# --- from the one to the other

def sources(): # yields (layer's name before its kind, name of the convolution there, of the norm)
    "Which arrays of the published file belong to which layers."
    yield "stem", "_conv_stem", "_bn0"
    for i, (_, name, expand, *_) in enumerate(names()):
        parts = ["expand"] * (expand > 1) + ["depthwise", "project"]
        first = 0 if expand > 1 else 1
        for k, part in enumerate(parts, first):
            yield f"{name}_{part}", f"_blocks.{i}._{part}_conv", f"_blocks.{i}._bn{k}"
    yield "head", "_conv_head", "_bn1"


def give(
    model,  # as `efficientnet_lite0` makes it
    arrays, # as `read_torch_checkpoint` gives them
):
    "Give a network the published arrays; raises `InputError` where they are another network's."
    known = {layer.name for layer in model.layers}
    kinds = "weight", "bias", "running_mean", "running_var"  # gamma, beta, mean, variance
    try:
        for name, conv, norm in sources():
            if f"{name}_conv" not in known: continue
            layer = model.get_layer(f"{name}_conv")
            order = (2, 3, 0, 1) if layer.channelwise else (2, 3, 1, 0)
            kernel = arrays[f"{conv}.weight"].transpose(order)
            parts = [kernel, *(arrays[f"{norm}.{kind}"] for kind in kinds)]
            for array, part in zip(ARRAYS, parts): getattr(layer, array).assign(part)
        if "head_classes" in known:
            parts = arrays["_fc.weight"].T, arrays["_fc.bias"]
            model.get_layer("head_classes").set_weights(parts)
    except (KeyError, ValueError) as error:
        raise InputError(f"not the arrays of EfficientNet-Lite0: {error}") from None


def in_float16(source, target): # paths of .weights.h5 files
    "A weights file with half the bytes; Keras reads it as the other."
    with h5py.File(source, "r") as whole, h5py.File(target, "w") as small:
        small.attrs.update(whole.attrs)
        def copy(name, item):
            if isinstance(item, h5py.Group): small.require_group(name).attrs.update(item.attrs)
            else:
                numbers = item[()]
                if item.dtype == "float32": numbers = numbers.astype("float16")
                small.create_dataset(name, data=numbers)
        whole.visititems(copy)


def convert(
    checkpoint, # path of the published file
    target,     # path, ends in .weights.h5
):
    "The backbone's weights in float16, out of the file that PyTorch wrote."
    target = Path(target)
    check(target.name.endswith(".weights.h5"), f"{target}: its name must end in .weights.h5")
    model = efficientnet_lite0()
    give(model, read_torch_checkpoint(checkpoint))
    aside = target.with_name(f"partial-{target.name}")
    try:
        model.save_weights(aside)
        in_float16(aside, target)
    finally: aside.unlink(missing_ok=True)


def load(
    path,     # of a file that `convert` wrote
    **kwargs, # to `efficientnet_lite0`
): # keras.Model
    "The pretrained backbone; raises `InputError` for a file that is not its weights."
    path = Path(path)
    check(path.is_file(), f"{path}: no such file")
    check(path.name.endswith(".weights.h5"), f"{path}: no .weights.h5 file; one that PyTorch wrote "
          f"becomes one by convert({path.name!r}, 'lite0.weights.h5')")
    model = efficientnet_lite0(**kwargs)
    try: model.load_weights(path)
    except Exception as error:  # Keras raises what it likes
        raise InputError(f"{path}: no weights of this backbone ({error})") from None
    return model


if __name__ == "__main__": convert(*sys.argv[1:3])
