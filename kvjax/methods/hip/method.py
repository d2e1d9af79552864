"""HiP attention: a search down a tree of pages finds those that a query reads."""

import functools
from typing import Any, Literal

from jaxtyping import Array, Float, Int

from kvjax.attention import selection
from kvjax.attention.partials import softmax_only
from kvjax.attention.tree_search import most_rounds
from kvjax.attention.typed import typed
from kvjax.interface import CacheSpec, Diagnostics, Method, Traffic
from kvjax.methods.hip import page_lists, sparse_prompt, stages
from kvjax.methods.hip.options import Options, share_of_budget
from kvjax.stores import buffers, contiguous, paged, step
from pallas_kernels.page_attention import page_attention


@typed
@softmax_only
def hip(
    *,
    budget: int = 1024,
    page_size: int = 16,
    num_sinks: int | None = None,
    window: int | None = None,
    key_stride: int = 1,
    representative: Literal["centre", "first", "last"] = "centre",
    per: Literal["kv", "query"] = "kv",
    group_reduce: selection.Reduce = "max",
    prefill: Literal["full", "sparse"] = "full",
    query_block: int = 32,
    search: Literal["tree", "stages"] = "tree",
    chunks: str = "256/32",
    kept: str = "32768/8192",
    strides: str = "16/8/4",
) -> Method:
    """Keeps every key; per step walks down a tree of pages to the few it reads.

    The pages between the first tokens and the newest ones are cut into as many groups
    as are to be found. In each round every group is cut in two, a half is scored by one
    page of it, the highest product of the query with its keys, and the best halves go
    on, until they are single pages: of n pages a search reads the keys of about
    2*K*log2(n/K). No summary is kept. The prompt is attended to in full, or sparsely as
    steps are: a block of queries shares what the first of them found.

    The paper searches once in eight steps and leaves the first three layers dense:
    `dense_layers:first=3+refresh:stride=8+hip:...`.

    `search="stages"` is that of InfiniteHiP: few stages of ever smaller chunks, each of
    which keeps the best of what the last one kept and runs once in steps of its own. A
    chunk is scored by the token that a walk down it comes to, the best of all heads:
    one list serves the layer. The first stage looks at every chunk.

    Args:
        budget: tokens read per step and list, first and newest ones among them, a
            multiple of `page_size`. Paper: 784, which it calls k = 512.
        page_size: tokens per page, which are searched and read together. Paper: 2.
        num_sinks: first tokens that are always read, in whole pages. None: the paper's
            share of the budget, 16 of 784.
        window: newest tokens that are always read, in whole pages, the current one
            among them. None: the paper's share, 256 of 784.
        key_stride: of the page that is scored, every so many keys are.
        representative: the page that stands for a group: its `centre`, `first` or
            `last`.
        per: one list of pages per `kv` head, or per `query` head.
        group_reduce: `max` or `mean` of the scores over a group of heads, for per="kv".
        prefill: attention to the prompt, `full` or `sparse`.
        query_block: queries of a prompt that share a list, for prefill="sparse".
        search: `tree`, or the `stages` of the later version, whose last chunks are
            pages.
        chunks: tokens in a chunk of every stage but the last.
        kept: tokens that every stage but the last keeps; the last keeps the budget.
        strides: steps from one run of a stage to its next, of every stage.

    Returns:
        A :class:`kvjax.Method` over :class:`kvjax.stores.paged.Paged`, without extremes
        of pages; of stages over :class:`kvjax.methods.hip.stages.StagesState`.

    State: pages `(B, Hkv, NP, P, 2*D)`, cache dtype; of stages the first tokens of what
        each kept, int32. A sparse prompt has one list of pages more while it is read.
        What is appended is kept.
    Reads per step and layer: 2*budget*D*Hkv elements of KV; to search at most
        rounds*2*K*ceil(P/key_stride)*D*Hkv elements of keys, where rounds is
        log2(n/K), rounded up, of n pages and the K that are found (Hq instead of Hkv
        lists for per="query"); in stages log2(l)+1 keys of each chunk of l tokens and
        query head, once in the stage's stride. Per row.
    Exact when: budget >= length, in whole pages.

    Raises:
        ValueError: unless `budget` and `window` are multiples of `page_size`, and the
            budget leaves a page to search for; for sizes of stages of which one does
            not suit the next.

    Source:
        Lee, Park, Lee, Suh, Kim, Jeong, Kim, Lee, Jeon, Hwang, "A Training-free
        Sub-quadratic Cost Transformer Model Serving Framework with Hierarchically
        Pruned Attention" (HiP), ICLR 2025, arXiv:2406.09827; stages: Lee, Park, Suh,
        Hwang, "InfiniteHiP: Extending Language Model Context Up to 3 Million Tokens on
        a Single GPU", arXiv:2502.08910, Alg. 1-3.
    Deviations:
        per="kv" shares a list among the query heads of a group. Groups differ in size
        by one page at most; the official code rounds them to multiples of a power of
        two. A logit of 0 is one like any other; there it is taken for masked. The
        paper's block of queries is led by all of them; here by the first, so that no
        later token has a say. Whole pages are the window, and those that begin while a
        list is held join it: the official code loses tokens between the two. Stages
        choose by Alg. 2 and 3 as written; the official code takes the running maximum
        of a walk, and of equal halves the right one. Positions are not re-numbered
        beyond the model's context, nor is a group searched again at random.

    Example:
        >>> method = kvjax.hip(budget=256)
        >>> state = method.init(spec)
    """
    options = Options(
        budget,
        page_size,
        share_of_budget("num_sinks", budget, page_size, num_sinks),
        share_of_budget("window", budget, page_size, window),
        key_stride,
        representative,
        per,
        group_reduce,
        prefill,
        query_block,
        search,
        chunks,
        kept,
        strides,
    )
    return by_stages(options) if search == "stages" else by_tree(options)


def by_tree(options: Options) -> Method:
    """Returns the method whose steps each search a tree."""
    is_full = options.prefill == "full"
    sparse = functools.partial(sparse_prompt.prefill, options)
    return Method(
        init=functools.partial(init, options),
        prefill=step.prefill if is_full else sparse,
        finish=step.finish_unchanged if is_full else sparse_prompt.finish,
        append=paged.extend,
        inspect_step=functools.partial(inspect_step, options),
        traffic=functools.partial(traffic, options),
        select=functools.partial(select, options),
        rewind=paged.rewind,
        exact_prompt=is_full,
    )


def by_stages(options: Options) -> Method:
    """Returns the method that searches in stages."""
    return Method(
        init=functools.partial(init, options),
        prefill=stages.prefill,
        finish=step.finish_unchanged,
        append=stages.append,
        inspect_step=functools.partial(stages.inspect_step, options),
        traffic=functools.partial(traffic_of_stages, options),
        exact_prompt=True,
    )


def init(
    options: Options, spec: CacheSpec, weights: Any = None
) -> paged.Paged | sparse_prompt.SparsePrompt | stages.StagesState:
    """Makes an empty store in pages, and what else the options keep."""
    del weights
    if options.search == "stages":
        return stages.init(options, spec)
    if options.prefill == "sparse":
        return sparse_prompt.init(options, spec)
    return paged.paged(spec, options.page_size, extremes=False)


def select(
    options: Options, state: paged.Paged, q: Float[Array, "B Hq 1 D"]
) -> Int[Array, "B H K"]:
    """Lists the pages of the newest token: window, sinks, and those found."""
    return page_lists.list_pages(options, state, q, state.length - 1)


def inspect_step(
    options: Options, state: paged.Paged, q: Float[Array, "B Hq 1 D"]
) -> tuple[paged.Paged, Float[Array, "B Hq 1 D"], Diagnostics]:
    """Attends to the listed pages."""
    rotated, positions = contiguous.rotate_queries(state.spec, q, state.length)
    listed = select(options, state, rotated)
    out, lse = page_attention(
        rotated, state.pages, listed, positions, sm_scale=state.spec.sm_scale
    )
    attended = paged.tokens_of(listed, options.page_size, state.length)
    diagnostics = step.diagnose(attended, lse, state.length)
    return state, out.astype(q.dtype), diagnostics


def candidates(options: Options, length: int) -> int:
    """Counts the pages between sinks and window, n, `length` tokens so far."""
    pages = -(-length // options.page_size)
    return max(pages - options.window_pages - options.sink_pages, 0)


def pages_read(options: Options, length: int) -> int:
    """Counts the pages of a list, `length` tokens so far."""
    pages = -(-length // options.page_size)
    return min(pages, options.budget // options.page_size)


def traffic(options: Options, spec: CacheSpec, length: int) -> Traffic:
    """Counts the bytes of the pages of a step, and at most those of its search."""
    count = candidates(options, length)
    most = options.pages_to_search_for
    # A round scores two halves of a group, of those that have a page.
    pages = most_rounds(count, most) * min(2 * most, count)
    keys = -(-options.page_size // options.key_stride)
    lists = spec.group if options.per == "query" else 1
    read = pages_read(options, length) * options.page_size
    return Traffic(
        kv=lists * buffers.row_bytes(spec, read, "both"),
        metadata=lists * buffers.row_bytes(spec, pages * keys, "keys"),
    )


def traffic_of_stages(options: Options, spec: CacheSpec, length: int) -> Traffic:
    """Counts the bytes of the pages of a step, and the share of its stages."""
    read = pages_read(options, length) * options.page_size
    tokens = candidates(options, length) * options.page_size
    metadata = 4 * spec.batch * sum(stages.sizes(options, spec))  # what each kept
    for stage in options.stages:
        chunks = -(-tokens // stage.chunk)
        keys = chunks * (1 + (stage.chunk - 1).bit_length())
        bytes_of_keys = spec.group * buffers.row_bytes(spec, keys, "keys")
        metadata += -(-bytes_of_keys // stage.stride)
        tokens = min(stage.kept, chunks) * stage.chunk
    return Traffic(buffers.row_bytes(spec, read, "both"), metadata)
