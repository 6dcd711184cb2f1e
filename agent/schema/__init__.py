"""All data that crosses the wire between client and agent: dataclasses, so that both sides share one declaration.

The agent has only Python 3.10's standard library; it builds these and says them as JSON. The client decodes them with
msgspec. Times are in seconds since 1970 by the host's clock, sizes in bytes, unless a field says otherwise.
"""
