"""What runs, pinned: ComfyUI, custom nodes and requirements; their updates, audit and bill of materials."""
