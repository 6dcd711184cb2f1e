"""What runs, pinned: ComfyUI, custom nodes and requirements, with updates, audit and SBOM."""
