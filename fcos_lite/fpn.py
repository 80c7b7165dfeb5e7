"""From C2..C5 to P2..P5."""
import math
import keras
from keras import layers
from fcos_lite.backbone import backbone, conv, group_norm

def pyramid(maps, network):
    "One map of `pyramid_channels` for every stride of the network."
    def norm_leaky(x, name):
        x = group_norm(network.pyramid_groups, network.group_epsilon, name=f"{name}_norm")(x)
        return layers.LeakyReLU(network.leaky_slope, name=f"{name}_leaky")(x)
    levels, merged = [], None
    finest = int(math.log2(network.strides[0]))
    for level, x in reversed(list(enumerate(maps, start=2))[finest - 2:]):
        x = norm_leaky(conv(network.pyramid_channels, 1, name=f"p{level}_lateral")(x), f"p{level}_lateral")
        if merged is not None:
            up = layers.UpSampling2D(2, name=f"p{level}_up")(merged)
            x = norm_leaky(layers.Add(name=f"p{level}_add")([x, up]), f"p{level}_fuse")
        merged = x
        levels.append(norm_leaky(conv(network.pyramid_channels, 3, name=f"p{level}_smooth")(x), f"p{level}_smooth"))
    levels = levels[::-1]
    while len(levels) < len(network.strides):   # P6, P7, ...: each half of the last
        level = finest + len(levels)
        levels.append(norm_leaky(conv(network.pyramid_channels, 3, 2, name=f"p{level}_down")(levels[-1]), f"p{level}_down"))
    return levels[:len(network.strides)]

def fpn_model(network):
    image = keras.Input((network.image_size, network.image_size, 3), name="image")
    return keras.Model(image, pyramid(backbone(image, network), network), name="FPN")
