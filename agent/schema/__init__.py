"""Dataclasses for all data exchanged between client and agent.

The agent, with only Python 3.10's standard library, prints them as JSON; the client decodes them with msgspec. Times
are in seconds since 1970 by the host's clock, sizes in bytes, unless a field says otherwise.
"""
