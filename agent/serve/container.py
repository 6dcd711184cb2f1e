"""Starts ComfyUI in a container, and checks its health. An image has this file alone, next to `container.json`."""

import json
import os
import shutil
import sys
from pathlib import Path
from urllib.request import urlopen

PORT = "8188"
DEFAULTS = "defaults"


def start(place: Path) -> None:
    """Make the folders of the data that do not exist yet, with the shipped defaults, then become ComfyUI.

    COMFYUI_LISTEN and COMFYUI_PORT replace the address and port inside the container.
    """
    settings = json.loads((place / "container.json").read_text())
    data = Path(settings["data"])
    try:
        for name in settings["folders"]:
            (data / name).mkdir(parents=True, exist_ok=True)
        for shipped in sorted((place / DEFAULTS).glob("*/**/*")):
            kept = data / shipped.relative_to(place / DEFAULTS)
            if not shipped.is_dir() and not kept.exists():
                kept.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(shipped, kept)
    except OSError as error:
        print(
            f"error[not-writable]: {data} cannot be written by uid {os.getuid()}\n  cause: {error}\n"
            f"  next:  chown -R {os.getuid()} the folder that is mounted there, or use a volume",
            file=sys.stderr,
        )
        sys.exit(69)
    listen, port = os.environ.get("COMFYUI_LISTEN"), os.environ.get("COMFYUI_PORT")
    more = [*(["--listen", listen] if listen else []), *(["--port", port] if port else [])]
    argv = [*settings["argv"], *more, *sys.argv[2:]]
    os.execv(argv[0], argv)  # noqa: S606


def health() -> None:
    """Fail unless ComfyUI answers."""
    with urlopen(f"http://127.0.0.1:{os.environ.get('COMFYUI_PORT') or PORT}/system_stats", timeout=8) as answer:
        answer.read()


if __name__ == "__main__":
    health() if sys.argv[1] == "health" else start(Path(__file__).parent)
