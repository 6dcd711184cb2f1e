"""uv's settings, as the client and the agent pass them on."""

from __future__ import annotations

from typing import Any


def index_settings(config: dict[str, Any]) -> dict[str, str]:
    """Convert the indexes and certificates of a parsed uv.toml to uv's environment variables for them.

    Raises LookupError, TypeError or AttributeError for values that uv rejects, too.
    """
    config = {**config, **config.get("pip", {})}
    names = ("index-url", "extra-index-url", "keyring-provider", "allow-insecure-host", "native-tls", "system-certs")
    variables = {
        name: f"UV_{name.upper().replace('-', '_').replace('ALLOW_', '')}" for name in names if config.get(name)
    }
    found = {
        variable: " ".join(config[name])
        if isinstance(config[name], list)
        else str(config[name]).replace("True", "true")
        for name, variable in variables.items()
    }
    for each in config.get("index", []):
        if each.get("default"):
            found["UV_DEFAULT_INDEX"] = each["url"]
        elif not each.get("explicit"):
            named = f"{each['name']}={each['url']}" if "name" in each else each["url"]
            found["UV_INDEX"] = f"{found.get('UV_INDEX', '')} {named}".strip()
    return found
