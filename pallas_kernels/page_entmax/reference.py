"""The definition of `page_entmax`, and its path on every device (XLA)."""

from pallas_kernels.entmax.reference import entmax_attention
from pallas_kernels.shared.xla_lists import over_lists


def page_entmax(
    q, pages, page_ids, query_positions, mask, tau=None, *, sm_scale, alpha
):
    """See :func:`pallas_kernels.page_entmax.page_entmax`."""

    def attend(q, k, v, positions, held, tau):
        return entmax_attention(q, k, v, positions, held, alpha, sm_scale, tau)

    if tau is not None:
        lists = page_ids.shape[1]
        batch, num_q_heads, rows = tau.shape
        tau = tau.reshape(batch * lists, num_q_heads // lists, rows)
    return over_lists(attend, q, pages, page_ids, query_positions, mask, tau)
