"""Metrics of a host for Prometheus, over HTTP on loopback: the agent's command `metrics`, a unit beside ComfyUI's.

It reads and asks; it changes nothing but its own count of jobs. prometheus-client travels with the agent.
"""
