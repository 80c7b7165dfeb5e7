"""What is meant by a name, an address, an array; what a server may send; and what is refused, with the reason."""
import http.server
import os
import socket
import tempfile
import threading
from pathlib import Path
import numpy as np
import pytest
from PIL import Image
from fcos_lite.data.images import read_image
from fcos_lite.detect import sources
from fcos_lite.detect.sources import find_sources, read_frames
from fcos_lite.errors import InputError

@pytest.fixture
def folder(folder, scene):
    "Beside images and a video: a folder in it, names that look like something else, and what is neither."
    (folder / "a.png").rename(folder / "what[1].png")
    Image.fromarray(scene).save(folder / "a.jpg")
    for name in ("notes.txt", ".hidden.jpg"): (folder / name).write_text("not an image")
    (folder / "inner").mkdir()
    Image.fromarray(scene).save(folder / "inner" / "d.jpg")
    return folder

def kinds(given): return [(source.kind, Path(source.name).name) for source in find_sources(given)[0]]

def test_what_is_meant(folder, scene):
    assert kinds(folder) == [("image", "a.jpg"), ("image", "b.png"), ("image", "c.PNG"), ("video", "walk.avi"),
                             ("image", "what[1].png")]
    assert kinds(f"{folder}/**/*.jpg") == [("image", "a.jpg"), ("image", "d.jpg")]
    assert kinds(folder / "what[1].png") == [("image", "what[1].png")]   # a name, though it looks like a pattern
    given = [0, "camera:1", "rtsp://me:secret@host/live", "https://me:secret@host/a.jpg"]
    assert kinds(given) == [("camera", "camera:0"), ("camera", "camera:1"), ("camera", "live"), ("address", "a.jpg")]
    assert not any("secret" in source.name for source in find_sources(given)[0])
    assert kinds([scene, np.stack([scene] * 2), Image.fromarray(scene)]) == [
        ("image", "array"), ("image", "array:0"), ("image", "array:1"), ("image", "image")]

def test_one_thing_or_several(folder, scene):
    for given in (folder / "a.jpg", str(folder / "a.jpg"), scene, Image.fromarray(scene), 0, "https://host/a.jpg"):
        assert find_sources(given)[1], given
    for given in ([scene], (0,), np.stack([scene]), folder, f"{folder}/*.jpg"): assert not find_sources(given)[1], given

def test_what_is_not_there_is_refused(folder):
    os.mkdir(folder / "empty")
    for given, why in (
        ("nowhere.jpg", "no such file or folder; check the spelling"), (400 * "a" + ".jpg", "no such file"),
        ("a\0.jpg", "no such file"), (folder / "inner" / "*.png", "no image and no video has such a name; check"),
        (folder / "empty", "no image and no video in this folder"), ("ftp://host/a.jpg", "ftp:// cannot be read"),
        ("file:///etc/passwd", "file:// cannot be read"), ("nothing://here", "cannot be read"),
        ("http://[bad/a.jpg", "not an address"), ("data:image/png;base64," + 400 * "A", "an image inside an address"),
        (np.zeros((8, 8), np.uint8), "give .height, width, 3"), (np.zeros((8, 8, 3)), r"uint8 in \[0, 255\]"),
        (np.zeros((2, 8, 8, 4), np.uint8), "give .height, width, 3"), (None, "a NoneType: give an image"),
        (2.0, "a float"), (True, "a bool")):
        with pytest.raises(InputError, match=why): find_sources(given)

class Habits(http.server.BaseHTTPRequestHandler):
    "What it sends depends on what it is asked for."
    files = {}
    def do_GET(self):
        name = self.path.split("?")[0].strip("/")
        if name == "gone.jpg": return self.send_error(404)
        if name in ("moved.jpg", "secrets.jpg"):
            self.send_response(302)
            self.send_header("Location", "/good.jpg" if name == "moved.jpg" else "file:///etc/passwd")
            return self.end_headers()
        jpeg, video = self.files["jpeg"], self.files["video"]
        kind, body = {
            "unnamed": ("application/octet-stream", jpeg), "walk": ("video/mp4", video),
            "page": ("text/html; charset=utf-8", b"<!doctype html><title>an image</title>"),
            "lie.jpg": ("image/jpeg", b"\n <html>sorry</html>"), "text.jpg": ("image/jpeg", b"no image at all"),
            "empty.jpg": ("image/jpeg", b""), "cut.jpg": ("image/jpeg", jpeg[:len(jpeg) // 2]),
            "endless.jpg": ("image/jpeg", bytes(400_000)), "live": ("multipart/x-mixed-replace; boundary=x", b"--x"),
        }.get(name, ("image/jpeg", jpeg))
        lengths = {"large.jpg": str(10**12), "nonsense.jpg": "abc", "twice.jpg": "100, 100"}
        self.send_response(200)
        self.send_header("Content-Type", kind)
        if name != "endless.jpg": self.send_header("Content-Length", lengths.get(name, str(len(body))))
        self.end_headers()
        self.wfile.write(body[:len(body) // 2] if name == "half.jpg" else body)
    def log_message(self, *_): pass

@pytest.fixture
def server(folder, monkeypatch):
    files = {"jpeg": (folder / "a.jpg").read_bytes(), "video": (folder / "walk.avi").read_bytes()}
    monkeypatch.setattr(Habits, "files", files)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Habits)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()

def fetch(address): return list(read_frames(find_sources(address)[0]))

def test_images_come_from_a_server(server, folder):
    for name in ("good.jpg?size=large", "moved.jpg", "unnamed", "nonsense.jpg", "twice.jpg"):
        frame, = fetch(f"{server}/{name}")
        np.testing.assert_array_equal(frame.image, read_image(folder / "a.jpg"))

def test_what_a_server_should_not_send_is_refused(server, monkeypatch):
    for name, why in (
        ("gone.jpg", "the server says 404"), ("page", "a web page, not an image"), ("lie.jpg", "this is a web page"),
        ("text.jpg", "not an image"), ("empty.jpg", "0 bytes"), ("cut.jpg", "truncated or damaged"),
        ("half.jpg", "the connection broke off after"), ("large.jpg", "more than 50 MB"), ("live", "this is a camera"),
        ("secrets.jpg", "is not allowed")):
        with pytest.raises(InputError, match=why): fetch(f"{server}/{name}")
    monkeypatch.setattr(sources, "_MAX_IMAGE", 200_000)
    with pytest.raises(InputError, match="more than 0 MB"): fetch(f"{server}/endless.jpg")   # announced no length
    monkeypatch.setattr(sources, "_IMAGE_SECONDS", -1.0)
    with pytest.raises(InputError, match="not there after"): fetch(f"{server}/good.jpg")

def test_a_server_that_is_not_there():
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))   # bound and not listening: refused
        address = f"http://127.0.0.1:{unused.getsockname()[1]}/a.jpg"
        with pytest.raises(InputError, match="cannot be reached"): fetch(address)
    for nonsense in ("http://", "http://host:port/a.jpg"):
        with pytest.raises(InputError): fetch(nonsense)

def test_frames_of_all_sources_in_order(folder, server, scene):
    frames = fetch([folder, f"{server}/good.jpg", f"{server}/walk", scene, Image.fromarray(scene)])
    assert [Path(frame.name).name for frame in frames] == [
        "a.jpg", "b.png", "c.PNG", *["walk.avi"] * 5, "what[1].png", "good.jpg", *["walk"] * 5, "array", "image"]
    assert [frame.time is None for frame in frames] == [True] * 3 + [False] * 5 + [True] * 2 + [False] * 5 + [True] * 2
    np.testing.assert_array_equal(frames[1].image, scene)
    assert not list(Path(tempfile.gettempdir()).glob("fcos_lite-*/video*"))   # the video from the network is gone

def test_what_cannot_be_read_is_named_and_the_rest_goes_on(folder):
    (folder / "b.png").write_bytes(b"")
    (folder / "walk.avi").write_bytes(b"not a video")
    lines, found = [], find_sources(folder)[0]
    assert [Path(frame.name).name for frame in read_frames(found, lines.append)] == ["a.jpg", "c.PNG", "what[1].png"]
    assert len(lines) == 2 and "b.png: the file is empty" in lines[0] and "walk.avi: not a video" in lines[1]
    with pytest.raises(InputError, match="b.png: the file is empty"): list(read_frames(found))

def test_a_file_is_opened_when_its_turn_comes_once(folder, monkeypatch):
    opened, read = [], Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: opened.append(path.name) or read(path))
    frames = read_frames(find_sources([folder / "a.jpg", folder / "b.png", folder / "c.PNG"])[0])
    assert opened == []
    next(frames), next(frames)
    frames.close()
    assert opened == ["a.jpg", "b.png"]
