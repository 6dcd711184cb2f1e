"""The running ComfyUI: its service, health and confinement."""
