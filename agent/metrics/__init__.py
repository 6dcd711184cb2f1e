"""Prometheus metrics of a host, over HTTP on loopback: the agent's verb `metrics`, run by a separate unit.

Read-only except for its own job counts. prometheus-client is shipped with the agent.
"""
