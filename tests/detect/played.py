"""Cameras that play what a test wants of them."""
import threading
import time
import cv2
import numpy as np
from fcos_lite.errors import InputError

HANG = object()

def picture(number, width=64): # (48, width, 3) uint8, its number in its first pixel; lighter from 200 on
    image = np.full((48, width, 3), 100 if number < 200 else 200, np.uint8)
    image[0, 0] = number % 200
    return image

class Played:
    """A camera that plays a list: numbers are frames, 'bad' and 'empty' are torn ones, 'error' is OpenCV's, HANG never
    returns. At its end it says no, for ever. A polite one waits until each frame is seen."""
    def __init__(self, events, width=64, gap=0.0, polite=False):
        self.events, self.width, self.gap, self.polite = list(events), width, gap, polite
        self.released, self.free, self.seen = threading.Event(), threading.Event(), threading.Semaphore(0)
        self.reader, self.unseen = None, False
    def read(self):
        if self.polite and self.unseen: self.seen.acquire(timeout=20)
        self.unseen = False
        self.reader = threading.current_thread()
        time.sleep(self.gap)
        event = self.events.pop(0) if self.events else "bad"
        if event is HANG: self.free.wait(60)
        if event == "error": raise cv2.error("cannot decode")
        if event == "empty": return True, np.zeros((0, 0, 3), np.uint8)
        if event in ("bad", HANG): return False, None
        self.unseen = True
        return True, picture(event, self.width)
    def release(self):
        assert self.reader in (None, threading.current_thread()), "released by a thread that does not read"
        self.released.set()

class Shelf:
    "What is found each time that somebody opens the camera; None: nothing."
    def __init__(self, *cameras): self.cameras = list(cameras)
    def __call__(self, address):
        found = self.cameras.pop(0) if self.cameras else None
        if not found: raise InputError(f"camera:{address}: no such camera")
        return found
