"""ComfyUI nodes that save pictures and videos without metadata and sign them with C2PA content credentials.

The chain of certificates (leaf first) and the leaf's P-256 key are PEM texts in the variables C2PA_CHAIN and C2PA_KEY.
How: docs/how-to/clean-outputs.md
"""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any

import c2pa
import folder_paths
import numpy as np
from comfy_api.input_impl import VideoFromComponents
from PIL import Image

FORMATS: dict[str, tuple[str, dict[str, Any]]] = {
    "png": ("image/png", {"compress_level": 4}),
    "jpeg": ("image/jpeg", {"quality": 95}),
    "webp": ("image/webp", {"lossless": True}),
}

# cv.iptc.org/newscodes/digitalsourcetype
ORIGINS = ("trainedAlgorithmicMedia", "compositeWithTrainedAlgorithmicMedia", "algorithmicMedia", "digitalCreation")
ORIGIN = (list(ORIGINS), {"tooltip": "How the output was made, as the credentials say."})


class SaveSignedImage:
    """Saves pictures without metadata, signed."""

    CATEGORY = "image"
    DESCRIPTION = "Saves pictures without metadata, signed with C2PA content credentials."
    FUNCTION = "save"
    OUTPUT_NODE = True
    RETURN_TYPES = ()

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802  ComfyUI's name
        return {
            "required": {
                "images": ("IMAGE",),
                "filename_prefix": ("STRING", {"default": "signed/ComfyUI"}),
                "format": (list(FORMATS),),
                "origin": ORIGIN,
            }
        }

    def save(self, images: Any, filename_prefix: str, format: str, origin: str) -> dict[str, Any]:  # noqa: A002
        signer = _signer()
        height, width = images[0].shape[:2]
        place = folder_paths.get_save_image_path(filename_prefix, folder_paths.get_output_directory(), width, height)
        folder, name, counter, subfolder, _ = place
        saved = []
        for number, image in enumerate(images, counter):
            plain = io.BytesIO()
            pixels = np.clip(255.0 * image.cpu().numpy(), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(plain, format, **FORMATS[format][1])  # a new file: it has no metadata
            path = Path(folder) / f"{name}_{number:05}_.{format}"
            path.write_bytes(sign(plain, FORMATS[format][0], origin, signer))
            saved.append({"filename": path.name, "subfolder": subfolder, "type": "output"})
        return {"ui": {"images": saved}}


class SaveSignedVideo:
    """Saves a video as MP4 without metadata, signed."""

    CATEGORY = "video"
    DESCRIPTION = "Saves a video as MP4 (H.264) without metadata, signed with C2PA content credentials."
    FUNCTION = "save"
    OUTPUT_NODE = True
    RETURN_TYPES = ()

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802  ComfyUI's name
        prefix = ("STRING", {"default": "signed/ComfyUI"})
        return {"required": {"video": ("VIDEO",), "filename_prefix": prefix, "origin": ORIGIN}}

    def save(self, video: Any, filename_prefix: str, origin: str) -> dict[str, Any]:
        signer = _signer()
        width, height = video.get_dimensions()
        place = folder_paths.get_save_image_path(filename_prefix, folder_paths.get_output_directory(), width, height)
        folder, name, counter, subfolder, _ = place
        plain = io.BytesIO()
        VideoFromComponents(video.get_components()).save_to(plain)  # a file that was loaded would keep its metadata
        path = Path(folder) / f"{name}_{counter:05}_.mp4"
        path.write_bytes(sign(plain, "video/mp4", origin, signer))
        return {
            "ui": {"images": [{"filename": path.name, "subfolder": subfolder, "type": "output"}], "animated": (True,)}
        }


def _signer() -> c2pa.Signer:
    chain, key = os.environ.get("C2PA_CHAIN", ""), os.environ.get("C2PA_KEY", "")
    if not (chain and key):
        raise ValueError(
            "C2PA_CHAIN or C2PA_KEY is not set: inv secret set, then inv deploy; docs/how-to/clean-outputs.md"
        )
    info = c2pa.C2paSignerInfo(c2pa.C2paSigningAlg.ES256, f"{chain}\n".encode(), f"{key}\n".encode(), None)
    return c2pa.Signer.from_info(info)


def sign(plain: io.BytesIO, mime: str, origin: str, signer: c2pa.Signer) -> bytes:
    """Return a file with content credentials: who signed it, and how it was made. Asks no time stamp service."""
    action = {
        "action": "c2pa.created",
        "digitalSourceType": f"http://cv.iptc.org/newscodes/digitalsourcetype/{origin}",
    }
    manifest = {
        "claim_generator_info": [{"name": "ComfyUI"}],
        "assertions": [{"label": "c2pa.actions", "data": {"actions": [action]}}],
    }
    signed = io.BytesIO()
    plain.seek(0)
    settings = {"builder": {"thumbnail": {"enabled": False}}}  # it would add 300 kB and more
    with c2pa.Context.from_dict(settings) as context, c2pa.Builder(json.dumps(manifest), context) as builder:
        builder.sign(signer, mime, plain, signed)
    return signed.getvalue()


NODE_CLASS_MAPPINGS = {"SaveSignedImage": SaveSignedImage, "SaveSignedVideo": SaveSignedVideo}
NODE_DISPLAY_NAME_MAPPINGS = {
    "SaveSignedImage": "Save Signed Image (C2PA)",
    "SaveSignedVideo": "Save Signed Video (C2PA)",
}
