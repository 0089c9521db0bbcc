"""Why adapters answered, on a terminal, for every kind of router."""

from collections.abc import Mapping
from typing import Any

from server.admin_tables import Printer
from server.router_views import print_layers, print_route
from server.token_views import print_tokens


def print_explanation(out: Printer, lora: Mapping[str, Any], most: int) -> None:
    """What an explained answer tells of its route: each layer's choice, each token's adapter, or the scores.

    `most`: of these, so many are shown.
    """
    if "layers" in lora:
        print_layers(out, lora)
    elif "tokens" in lora:
        print_tokens(out, lora)
    else:
        print_route(out, lora, most)
