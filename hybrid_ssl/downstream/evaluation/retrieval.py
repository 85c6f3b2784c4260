"""Retrieval: do images of one class lie closest to each other? Mean average precision by cosine, exact.

A query's gallery is ranked by falling cosine; of equals the lower number comes first. Relevant are the gallery's
images of the query's class, R of them, the query itself excluded. With hits(k) relevant ones among the first k,

    AP     = 1 / R         x  sum of hits(k) / k over the ranks k of relevant images
    AP@K   = 1 / min(R, K) x  the same sum over ranks up to K
    recall@K = 1 if hits(K) > 0 else 0   (metric learning's word: whether anything was found)

and mAP, mAP@K, recall@K are means over the queries that have R > 0; the others are counted.
Shapes: n gallery images, b queries of a block.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from .settings import RetrievalSettings
from .work import Bench, Found, dealt

_SIMILARITIES = 2**24  # similarities held at once: 64 MiB of float32


def run(bench: Bench, cfg: RetrievalSettings) -> Found:
    """mAP, and mAP@k and recall@k for every k.

    Raises:
        ValueError: no query has a relevant image.
    """
    alone = cfg.gallery == "test"
    gallery = bench.test if alone else bench.train
    keys = normalize(gallery.features["pooled"].float(), dim=1).to(bench.device)
    queries = normalize(bench.test.features["pooled"].float(), dim=1)
    labels, wanted = gallery.labels.to(bench.device), bench.test.labels.to(bench.device)
    blocks = torch.arange(len(queries)).split(max(1, _SIMILARITIES // len(keys)))

    def block(rows: Tensor) -> Tensor:
        similarity = queries[rows].to(bench.device) @ keys.T  # [b, n]
        relevant = labels == wanted[rows.to(bench.device)][:, None]
        return precisions(similarity, relevant, cfg.ks, rows.to(bench.device) if alone else None).cpu()

    found = torch.cat(dealt(blocks, block))  # [m, 1 + 2 * len(ks)]
    known = ~found[:, 0].isnan()
    if not known.any():
        raise ValueError("retrieval: no class has two test images, so there is nothing to find: use gallery=train")
    if not known.all():
        bench.say(f"retrieval: {int((~known).sum())} test images have no other of their class and are no queries")
    names = ["mAP", *(f"mAP@{k}" for k in cfg.ks), *(f"recall@{k}" for k in cfg.ks)]
    means = found[known].mean(0).tolist()
    return Found("mAP", dict(zip(names, means, strict=True)) | {"queries": int(known.sum())}, {})


def precisions(similarity: Tensor, relevant: Tensor, ks: list[int], itself: Tensor | None = None) -> Tensor:
    """AP, AP@k and recall@k of each query: float64 [b, 1 + 2 * len(ks)], NaN without relevant images.

    Args:
        similarity: [b, n].
        relevant: [b, n] bool.
        itself: [b], which column a query is and must not find; None: it is not in the gallery.
    """
    if itself is not None:
        similarity = similarity.scatter(1, itself[:, None], -torch.inf)  # ranked last, and not relevant
        relevant = relevant.scatter(1, itself[:, None], False)
    order = similarity.argsort(dim=1, descending=True, stable=True)
    hit = relevant.gather(1, order)  # [b, n], by rank
    hits = hit.cumsum(1, dtype=torch.float64)
    total = hits[:, -1]
    ranks = torch.arange(1, hit.shape[1] + 1, device=hit.device, dtype=torch.float64)
    summed = (hits / ranks * hit).cumsum(1)
    last = [min(k, hit.shape[1]) - 1 for k in ks]
    columns = [summed[:, -1] / total]
    columns += [summed[:, i] / total.clamp(max=k) for k, i in zip(ks, last, strict=True)]
    columns += [(hits[:, i] > 0).double() for i in last]
    return torch.stack(columns, 1).masked_fill((total == 0)[:, None], torch.nan)
