"""Metrics of a host for Prometheus, over HTTP on loopback: a unit beside ComfyUI's, which a Python of the host runs.

What is sent there is a tree of this package, of the agent's modules that it imports, and of prometheus-client
(`deploy/exporter.py`). It reads and asks; it changes nothing but its own count of jobs.
"""
