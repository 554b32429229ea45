"""The cost model of README.md: bytes that a rank sends in a step of HiMoLoss, and its FLOPs.

Tests compare it with the counted collectives.
"""

from collections import Counter

_RECORD_BYTES = 6 * 8  # of one rank, in the agreement
_WIDE = 8  # bytes of a float64, the dtype of the PCA


def step_traffic(
    ranks: int,
    rows: int,
    features: int,
    *,
    strategy: str = "gather",
    feature_bytes: int = 4,
    scope: str = "global",
    labels: bool = False,
) -> Counter[str]:
    """Bytes that each rank sends in HiMoLoss's forward and backward, by kind of collective.

    Args:
        ranks: W.
        rows: M, the same on every rank; N = W M.
        features: D.
        strategy: "gather" or "ring".
        feature_bytes: bytes per feature, 2, 4 or 8; a sum has max(4, feature_bytes).
        scope: of the PCA, "global" or "local".
        labels: whether the rows have labels, which "gather" takes.
    """
    others, total = ranks - 1, ranks * rows
    keys, sums = 2 * features, max(4, feature_bytes)  # texts and components; bytes of a sum
    reduced = 2 * others / ranks  # buffers sent per all-reduce
    sent: Counter[str] = Counter()

    def add(kind: str, count: float) -> None:
        sent[kind] += round(count)

    add("all_gather", others * _RECORD_BYTES)
    if scope == "global" and features <= total:
        triangle = features * (features + 1) // 2
        add("all_gather", others * features * _WIDE)  # means
        add("all_reduce", reduced * triangle * _WIDE)  # moments
        add("all_reduce", reduced * (triangle + features) * _WIDE)  # their gradients
        add("broadcast", _WIDE)  # the PCA's rank; the last process does not pass it on
    elif scope == "global":
        add("all_gather", others * rows * features * _WIDE)
        add("reduce_scatter", others * rows * features * _WIDE)
    if labels:
        sides = keys + features  # and the images
        add("all_gather", others * rows * (8 + sides * feature_bytes))
        add("reduce_scatter", others * rows * sides * sums)
        return sent
    add("all_to_all", others * rows * 4 * sums)  # two statistics of each column of two losses
    forward_block = rows * (keys * feature_bytes + 2 * sums)
    if strategy == "gather":
        add("all_gather", others * forward_block)
        add("all_gather", others * rows * 6 * sums)
        add("reduce_scatter", others * rows * keys * sums)
    else:
        add("send", others * forward_block)
        add("send", others * rows * (keys * feature_bytes + 6 * sums))
        add("send", ranks * rows * keys * sums)
    return sent


def step_flops(ranks: int, rows: int, features: int) -> float:
    """Floating-point operations of a rank's two losses: 2 forward, 6 backward for each product."""
    return 2 * 8 * rows * (ranks * rows) * features
