"""Full attention over the whole cache: the baseline, and the oracle of the others."""

from kvjax import dense
from kvjax.interface import Method


def full() -> Method:
    """Keeps every key and value and attends to all of them.

    By the model's own normaliser: softmax, or entmax of any alpha.

    Returns:
        A :class:`kvjax.Method` over :class:`kvjax.stores.contiguous.Contiguous`.

    State: k, v `(B, Hkv, S, D)` cache dtype; length `(B,)` int32. What is appended is
        kept.
    Reads per step and layer: 2*length*D*Hkv elements of KV, per row.
    Exact when: always.

    Source:
        Vaswani et al., "Attention Is All You Need", NeurIPS 2017, arXiv:1706.03762.
        Entmax: Peters, Niculae, Martins, "Sparse Sequence-to-Sequence Models", ACL
        2019, arXiv:1905.05702.
    Deviations:
        none known.

    Example:
        >>> method = kvjax.full()
        >>> state = method.init(spec)
    """
    return dense.method()
