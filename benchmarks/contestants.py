"""Who takes part in which method. Peers are imported only when they are asked for."""

from __future__ import annotations

from importlib.util import find_spec

from .work import Trainer, Work

OURS = "ours"
ENTRIES = {
    "lightly": ("mae", "simmim", "moco_v3", "dino", "ibot"),
    "lightly, joined": ("dino",),
    "transformers": ("mae", "simmim"),
}
PEERS = ("lightly", "transformers")


def peers_of(method: str, libraries: tuple[str, ...] = PEERS) -> list[str]:
    """The peers' entries for a method, of these libraries."""
    return [peer for peer, methods in ENTRIES.items() if method in methods and library_of(peer) in libraries]


def library_of(entry: str) -> str:
    return entry.split(",")[0]


def missing(libraries: tuple[str, ...]) -> list[str]:
    """Those that are not installed."""
    return [library for library in libraries if find_spec(library) is None]


def build(entry: str, work: Work) -> Trainer:
    """A fresh trainer of `ours` or a peer's entry."""
    if entry == OURS:
        from .ours import Ours

        return Ours(work)
    if entry == "transformers":
        from . import with_transformers

        return with_transformers.Transformers(work, getattr(with_transformers, work.method))
    from . import with_lightly

    name = work.method if entry == "lightly" else "dino_joined"
    return with_lightly.Lightly(work, getattr(with_lightly, name))
