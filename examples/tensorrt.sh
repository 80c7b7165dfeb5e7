#!/bin/sh
# From a detector to TensorRT engines, FP16 and INT8, on a machine with an NVIDIA GPU and TensorRT 10
# (trtexec comes with it; NVIDIA's container tensorrt has it in /opt/tensorrt/bin).
#
#   sh examples/tensorrt.sh WEIGHTS PHOTOGRAPHS OUT [IMAGE_SIZE]
#   sh examples/tensorrt.sh person photographs/ engines 256
#
# NOT RUN BY US: no TensorRT was at hand when this was written. What is tested is the ONNX files that it starts
# from, by ONNX Runtime on a CPU. Two places to look at first if the builder complains:
#   - NMS is a Loop in the graph. TensorRT supports loops (its Loop layer); if yours refuses it, add --no-nms to the
#     first two commands: the engine then returns "boxes" (1, N, 4) and "scores" (1, N, classes), and TensorRT's own
#     NMS layer or plug-in, or fcos_lite.detector.nms, suppresses among them.
#   - the input is uint8. TensorRT takes uint8 as a network's input only if a cast comes first, as it does here.
#
# What it should print, for each engine (times depend on the GPU; the last line is what counts):
#   [I] Engine built in ... sec.
#   [I] === Performance summary ===
#   [I] Throughput: ... qps
#   [I] Latency: min = ... ms, max = ... ms, mean = ... ms, median = ... ms, percentile(90%) = ... ms
#   [I] GPU Compute Time: min = ... ms, ...
#   &&&& PASSED TensorRT.trtexec [TensorRT v10....] # trtexec --onnx=...
# And Polygraphy, for FP16 against ONNX Runtime's float32: "PASSED | All outputs matched" within the tolerances
# given, or a table of the outputs that did not.
set -eu
weights=$1 photographs=$2 out=$3 size=${4:-256}
mkdir -p "$out"

# 1. Two ONNX files: float32, and one with a QuantizeLinear and a DequantizeLinear around every convolution
#    ("explicit quantisation": TensorRT needs no calibration of its own, and rounds where we measured).
export_onnx() { python -m fcos_lite.export --weights "$weights" --format onnx --image-size "$size" --force "$@"; }
export_onnx --out "$out/onnx"
export_onnx --out "$out/onnx-int8" --precision int8 --calibration "$photographs"

# 2. Engines. They hold for this GPU and this version of TensorRT alone: build them where they run.
trtexec --onnx="$out/onnx/model.onnx" --fp16 --saveEngine="$out/fp16.engine" --useCudaGraph --useSpinWait
trtexec --onnx="$out/onnx-int8/model.onnx" --int8 --fp16 --saveEngine="$out/int8.engine" --useCudaGraph --useSpinWait

# 3. Are the boxes still the same? (pip install polygraphy) On eight of the photographs, for a random image holds no
#    object and all tables would be empty. Boxes in pixels, scores in 0..1; boxes whose scores are nearly equal may
#    change places, and are then reported. INT8 rounds more: its engine is compared with its ONNX file, with wider
#    limits.
cat > "$out/load.py" << 'END'
import os
from pathlib import Path
import numpy as np
from fcos_lite.data.images import read_image
from fcos_lite.data.letterbox import Letterbox

def load_data():
    size, folder = int(os.environ["FCOS_SIZE"]), Path(os.environ["FCOS_PHOTOGRAPHS"])
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() in (".jpg", ".jpeg", ".png"))
    for file in files[:8]:
        image = read_image(file)
        letterbox = Letterbox.fit(image.shape[1], image.shape[0], size)
        yield {"image": letterbox.apply(image, 114)[None].astype(np.uint8)}
END
if command -v polygraphy > /dev/null; then
    export FCOS_SIZE="$size" FCOS_PHOTOGRAPHS="$photographs"
    compare() { polygraphy run --onnxrt --trt --fp16 --data-loader-script "$out/load.py" --rtol 0 "$@"; }
    differ=0   # both are compared, whatever the first one's result
    compare "$out/onnx/model.onnx" --atol boxes:1.0 scores:0.01 || differ=1
    compare "$out/onnx-int8/model.onnx" --int8 --atol boxes:4.0 scores:0.05 || differ=1
    exit $differ
fi
