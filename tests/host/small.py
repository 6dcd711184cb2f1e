"""A stand-in for ComfyUI, for tests of the service: it starts in half a CPU second instead of five."""

from __future__ import annotations

import shutil
from pathlib import Path

from core.stack import stacks
from tests.host.fleet import modified

MAIN = """\
import comfyui_version, http.server, importlib, itertools, json, os, pathlib, queue, signal, socket, struct, sys
import threading, time, zlib

def flag(name):
    return sys.argv[::-1][sys.argv[::-1].index(name) - 1]  # the last one

def picture(width, height):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    head, rows = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0), (b"\\0" + bytes(3 * width)) * height
    return b"\\x89PNG\\r\\n\\x1a\\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")

def now():
    return int(time.time() * 1000)

class Jobs:
    def __init__(self):
        self.given, self.waiting, self.running, self.over = queue.Queue(), [], [], {}
        threading.Thread(target=self.work, daemon=True).start()

    def add(self, workflow):
        number = len(self.over) + len(self.waiting) + len(self.running)
        job = [number, f"{os.getpid()}-{number}", workflow, {"create_time": now()}, ["2"]]
        self.waiting.append(job)
        print("got prompt", flush=True)
        self.given.put(job)
        return job[1]

    def work(self):
        while job := self.given.get():
            self.running.append(job)
            self.waiting.remove(job)
            begun, (size, saved) = now(), (job[2][node]["inputs"] for node in "12")
            finish = pathlib.Path(flag("--output-directory"), "finish")
            while size["width"] == 65 and not finish.exists():
                time.sleep(0.05)
            finish.unlink(missing_ok=True)
            folder, _, name = saved["filename_prefix"].rpartition("/")
            place = pathlib.Path(flag("--output-directory"), folder)
            place.mkdir(parents=True, exist_ok=True)
            path = next(path for n in itertools.count(1) if not (path := place / f"{name}_{n:05}_.png").exists())
            path.write_bytes(picture(size["width"], size["height"]))
            events = [["execution_start", {"timestamp": begun}], ["execution_success", {"timestamp": now()}]]
            self.over[job[1]] = {
                "prompt": job,
                "outputs": {"2": {"images": [{"filename": path.name, "subfolder": folder, "type": "output"}]}},
                "status": {"status_str": "success", "completed": True, "messages": events},
            }
            self.running.remove(job)
            print("Prompt executed", flush=True)

TYPES, NODES = {"EmptyImage": {"python_module": "nodes"}}, pathlib.Path(flag("--base-directory"), "custom_nodes")
sys.path.append(str(NODES))
for place in sorted(NODES.iterdir()):
    try:
        found = importlib.import_module(place.name).NODE_CLASS_MAPPINGS
        TYPES |= {name: {"python_module": f"custom_nodes.{place.name}"} for name in found}
    except Exception as error:
        print(f"Cannot import {place} module for custom nodes: {error}")
        print(f"   0.0 seconds (IMPORT FAILED): {place}")

jobs = Jobs()
SYSTEM = {"comfyui_version": comfyui_version.__version__, "pytorch_version": "TORCH", "argv": sys.argv}

def answer(path, query, body):
    kind, _, name = path.partition("/")
    if kind == "view":
        given = dict(each.split("=", 1) for each in query.replace("%2F", "/").split("&"))
        return pathlib.Path(flag("--output-directory"), given["subfolder"], given["filename"]).read_bytes()
    return json.dumps({
        "system_stats": lambda: {"system": SYSTEM, "devices": [{"name": "cpu", "type": "cpu"}]},
        "queue": lambda: {"queue_running": [*jobs.running], "queue_pending": [*jobs.waiting]},
        "prompt": lambda: {"prompt_id": jobs.add(json.loads(body)["prompt"])},
        "history": lambda: {each: done for each, done in [*jobs.over.items()] if name in ("", each)},
        "object_info": lambda: {each: found for each, found in TYPES.items() if name in ("", each)},
        "free": lambda: {},
        "api": lambda: {"pagination": {"total": 0}},
    }[kind]()).encode()

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        path, _, query = self.path[1:].partition("?")
        try:
            body = answer(path, query, self.rfile.read(int(self.headers.get("Content-Length") or 0)))
        except LookupError:
            body = b""
        self.send_response(200 if body else 404)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_POST = do_GET

    def log_message(self, *_):
        pass

def stop(*_):
    print("Stopped server", flush=True)
    os._exit(0)

class Server(http.server.ThreadingHTTPServer):
    def __init__(self, address):
        self.address_family = socket.AF_INET6 if ":" in address else socket.AF_INET
        super().__init__((address, int(flag("--port"))), Handler)
        if "--tls-keyfile" in sys.argv:
            import ssl
            tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            tls.load_cert_chain(flag("--tls-certfile"), flag("--tls-keyfile"))
            self.socket = tls.wrap_socket(self.socket, server_side=True)

signal.signal(signal.SIGINT, stop)
first, *others = [Server(each) for each in flag("--listen").split(",")]
for server in others:
    threading.Thread(target=server.serve_forever, daemon=True).start()
print("To see the GUI go to: http://127.0.0.1:" + flag("--port"), flush=True)
first.serve_forever()
"""

KEPT = ("LICENSE", "README.md", "comfyui_version.py", "folder_paths.py", "requirements.txt")
"""What Hearth reads of ComfyUI's tree, beside `comfy/cli_args.py`."""


def small(place: Path, name: str, line: str = "") -> Path:
    """The stand-in as an application for $HEARTH_APP, with ComfyUI's environment; returns the app.toml's folder.

    Another `name` is another tree. `line` is the first one of its main.py. A picture 65 pixels wide is ready
    when the file `finish` is in the output folder.
    """
    folder = modified(place / name, {"README.md": (r"\A", f"{name}\n")})
    src = folder / "src"
    flags = (src / "comfy/cli_args.py").read_text()
    for path in src.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name not in KEPT:
            path.unlink()
    (src / "comfy").mkdir()
    (src / "comfy/cli_args.py").write_text(flags)
    (src / "main.py").write_text(f"{line}\n{MAIN.replace('TORCH', stacks()['cu130'].torch)}")
    return folder
