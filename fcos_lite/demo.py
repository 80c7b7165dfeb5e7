"""Ten minutes, nothing to download: learn, measure, look."""
from pathlib import Path
import cv2
import matplotlib.cbook
import numpy as np
from fcos_lite import train
from fcos_lite.config import run_command
from fcos_lite.detect import detect_files, write_found
from fcos_lite.model import FCOS
from fcos_lite.scenes import Scenes, World

WORLD = ["--min-height", "24", "--max-height", "110", "--max-people", "4"]
LEARN = ["--image-size", "128", "--scenes", "1000", "--epochs", "8"]

def main(argv=None):
    out = Path("runs/demo")
    train.main([*LEARN, *WORLD, "--out", str(out), "--force"])
    model = FCOS.from_preset(out)
    pictures = out / "unseen"
    pictures.mkdir()
    for i, scene in enumerate(Scenes(10, seed=99, world=World(size=128, min_height=24, max_height=110, max_people=4))):
        cv2.imwrite(str(pictures / f"scene{i}.png"), scene.image[..., ::-1])
    hopper = Path(matplotlib.cbook.get_sample_data("grace_hopper.jpg", asfileobj=False))
    found = detect_files(model, [*sorted(pictures.glob("*.png")), hopper])
    write_found(found, out / "detected")
    print(f"numbers in {out}/evaluation.json and metrics.csv, pictures in {out}/detected and {out}/pictures")

if __name__ == "__main__": run_command(main)
