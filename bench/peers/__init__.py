"""Who is measured. Every file of this folder registers a peer, and imports its package when it is loaded."""

from importlib import import_module
from pkgutil import iter_modules

from bench.peers.base import PEERS, Call, Peer, features

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")

__all__ = ["PEERS", "Call", "Peer", "features"]
