"""OpenCV's ordinary wheel wants libGL, which servers lack: take the headless one there."""
import subprocess
import sys

PIP = [sys.executable, "-m", "pip", "--quiet"]

def imports():
    "Whether OpenCV can be imported here."
    return subprocess.run([sys.executable, "-c", "import cv2"], capture_output=True).returncode == 0

if not imports():
    subprocess.run([*PIP, "uninstall", "--yes", "opencv-python"], check=True)
    subprocess.run([*PIP, "install", "opencv-python-headless"], check=True)
    if not imports(): sys.exit("OpenCV cannot be imported, neither opencv-python nor opencv-python-headless")
