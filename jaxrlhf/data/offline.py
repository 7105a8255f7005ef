"""The environment variables that keep Hugging Face's libraries from asking the hub."""

import os

SWITCHES = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")


def refusal(kind: str, cache: str, switches: tuple[str, ...] = SWITCHES) -> str:
    """The reason, with the remedy, why a `kind` ("model") that the hub's `cache` does not hold cannot be had while one
    of the variables is set; "" if none is."""
    used = next((switch for switch in switches if os.environ.get(switch, "").upper() in {"1", "ON", "YES", "TRUE"}), "")
    return used and (
        f"there is nothing of that name here, the hub's cache ({cache}) holds no such {kind}, and {used} keeps the hub "
        f"from being asked. Run the command once with a network and without {used}, which fills the cache, or give the "
        "path of a local copy"
    )
