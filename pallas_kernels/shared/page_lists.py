"""Lists of pages in the order in which kernels walk through them: by who sees what.

XLA sorts each list first: pages that every query row sees in full, then pages cut by a
row's position or mask, which alone are masked, then none.
"""

import jax.numpy as jnp


def sort_keys(page_ids, num_pages, page_size, query_positions, mask, first_position=0):
    """`(kind, key)` of the listed pages, both as `page_ids`.

    Kind 0 is seen in full by every row, 1 by any in part, 2 by none. Keys sort by kind,
    then by page, which is `key % num_pages`.
    """
    first, last = query_positions.min(1), query_positions.max(1)
    start = page_ids * page_size
    is_full = start + page_size - 1 <= first[:, None, None]
    is_seen = (start <= last[:, None, None]) & (page_ids >= 0) & (page_ids < num_pages)
    if first_position:
        is_full &= start >= first_position
        is_seen &= start + page_size > first_position
    if mask is not None:
        is_full &= mask.all(-1)
        is_seen &= mask.any(-1)
    kind = jnp.where(is_seen, jnp.where(is_full, 0, 1), 2)
    # One key instead of a pair; three times the pages of a row are far below 2**31.
    return kind, kind * num_pages + jnp.where(is_seen, page_ids, 0)


def check(q, pages, page_ids, mask) -> None:
    """Raises `ValueError` if the shapes disagree."""
    if pages.shape[4] != 2 * q.shape[3]:
        raise ValueError(
            f"pages {pages.shape} must hold keys and values of q {q.shape}: "
            f"{pages.shape[4]=} must be 2 * {q.shape[3]}."
        )
    if page_ids.shape[1] not in (pages.shape[1], q.shape[1]):
        raise ValueError(
            f"page_ids {page_ids.shape} must list pages for {pages.shape[1]} KV heads "
            f"or {q.shape[1]} query heads."
        )
    if mask is not None and mask.shape != (*page_ids.shape, q.shape[2]):
        raise ValueError(
            f"mask {mask.shape} must have a flag for each of page_ids "
            f"{page_ids.shape} and of the {q.shape[2]} query rows."
        )
