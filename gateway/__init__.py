"""Gateways: HAProxy with logins, limits and an audit log in front of ComfyUI."""
