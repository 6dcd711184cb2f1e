"""How ComfyUI is kept running: its service, its health, its confinement."""
