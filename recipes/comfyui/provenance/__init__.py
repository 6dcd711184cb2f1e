"""A ComfyUI node that saves pictures without metadata and signs them with C2PA content credentials.

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
from PIL import Image

FORMATS: dict[str, tuple[str, dict[str, Any]]] = {
    "png": ("image/png", {"compress_level": 4}),
    "jpeg": ("image/jpeg", {"quality": 95}),
    "webp": ("image/webp", {"lossless": True}),
}

# cv.iptc.org/newscodes/digitalsourcetype
ORIGINS = ("trainedAlgorithmicMedia", "compositeWithTrainedAlgorithmicMedia", "algorithmicMedia", "digitalCreation")


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
                "origin": (list(ORIGINS), {"tooltip": "How the pictures were made, as the credentials say."}),
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
            path.write_bytes(sign(plain, format, origin, signer))
            saved.append({"filename": path.name, "subfolder": subfolder, "type": "output"})
        return {"ui": {"images": saved}}


def _signer() -> c2pa.Signer:
    chain, key = os.environ.get("C2PA_CHAIN", ""), os.environ.get("C2PA_KEY", "")
    if not (chain and key):
        raise ValueError(
            "C2PA_CHAIN or C2PA_KEY is not set: inv secret set, then inv deploy; docs/how-to/clean-outputs.md"
        )
    info = c2pa.C2paSignerInfo(c2pa.C2paSigningAlg.ES256, f"{chain}\n".encode(), f"{key}\n".encode(), None)
    return c2pa.Signer.from_info(info)


def sign(plain: io.BytesIO, format: str, origin: str, signer: c2pa.Signer) -> bytes:  # noqa: A002
    """Return a picture with content credentials: who signed it, and how it was made. Asks no time stamp service."""
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
        builder.sign(signer, FORMATS[format][0], plain, signed)
    return signed.getvalue()


NODE_CLASS_MAPPINGS = {"SaveSignedImage": SaveSignedImage}
NODE_DISPLAY_NAME_MAPPINGS = {"SaveSignedImage": "Save Signed Image (C2PA)"}
