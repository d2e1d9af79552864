"""A row of a comparison: what one method answered, lost and read, with its spread."""

import importlib
import importlib.util
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from kvjax.evaluation import continuations, fidelity, percentiles, records, statistics
from kvjax.evaluation.compare_inputs import Inputs
from kvjax.evaluation.statistics import Interval
from kvjax.evaluation.tasks.needles import Example

# Fields of `Inputs`, in the order they are answered in.
TASKS = ("own", "passkey", "multikey", "chain")
# What the fields of a row, and tasks in a file of answers, end in.
SUFFIX = {"seen": "", "after": "_after"}

# Intervals of the fields of `LayerFidelity`: an error has no upper bound.
OF_LAYERS: dict[str, Callable[[ArrayLike], Interval]] = {
    "error": statistics.amount_interval,
    "dropped": statistics.share_interval,
    "support": statistics.share_interval,
    "exact": statistics.share_interval,
    "refreshed": statistics.share_interval,
}

ByDepth = tuple[tuple[float, int, int], ...]  # (depth, correct, asked)


class Bytes(NamedTuple):
    """Bytes of cache of one row, all layers: counted from shapes, and measured.

    And what share of a prompt is attended to, counted alike.
    """

    read: int  # by a decode step, at most
    device: int  # held while decoding
    host: int = 0  # held in the host's memory besides
    measured: float = 0.0  # read by a step
    moved: float = 0.0  # came from the host's memory, neighbours of tokens too
    prompt_share: float = 1.0  # of the prompt's query-key pairs, those attended to


class Row(NamedTuple):
    """One method's line of the comparison."""

    method: str
    bytes_read: int  # of cache, per decoded token of one row at the full context: most
    bytes_measured: float  # what was read of it, mean over steps; see `measured_bytes`
    bytes_held: int  # of cache, while decoding, per row, in the device's memory
    # Against the reference, on the same tokens; over windows.
    kl: Interval  # KL(reference || method), nats per token
    kl_p99: Interval  # its 99th percentile over tokens; see `percentile_interval`
    top1_agreement: Interval  # same likeliest token as the reference
    # Tokens chosen greedily before the first that the reference does not choose, of
    # `new_tokens` behind each window's prompt.
    tokens_before_difference: Interval
    perplexity: Interval  # of tokens predicted by decode steps; over windows
    nats_lost: Interval  # log-probability given away per token, paired with reference
    # Of the layers, each fed what the reference's is; means over heads, over windows.
    output_error: Interval  # relative L2 error of the attention output
    dropped_mass: Interval  # of the reference's attention, on what was not attended to
    support: Interval  # share of the tokens with weight that was attended to
    proved_exact: Interval  # share of heads and steps: `Diagnostics.exact`
    full_steps: Interval  # share of steps and layers: `Diagnostics.refreshed`
    tokens_per_second: float  # median over batches of windows, all rows together
    prefill_seconds: float  # of one row's prompt, read alone
    chain_links: int  # asked for
    # Questions that end the prompt: seen when a method chooses what to keep.
    passkey: Interval | None = None
    multikey: Interval | None = None
    chain: Interval | None = None  # share of the links before the first mistake
    own: Interval | None = None  # the user's questions
    # Of methods that attend to some of the prompt's query-key pairs: their share.
    prompt_share: float | None = None
    # Of methods that keep keys and values in the host's memory.
    bytes_in_host: int | None = None  # while decoding, per row
    bytes_moved: float | None = None  # over the link: whole pages and blocks
    pages_found: Interval | None = None  # of those listed: were on the device
    passkey_by_depth: ByDepth | None = None
    multikey_by_depth: ByDepth | None = None
    # Questions that come after that, to the context that is kept.
    passkey_after: Interval | None = None
    multikey_after: Interval | None = None
    chain_after: Interval | None = None
    own_after: Interval | None = None
    passkey_after_by_depth: ByDepth | None = None
    multikey_after_by_depth: ByDepth | None = None


class Results(NamedTuple):
    """The rows of a comparison."""

    rows: tuple[Row, ...]  # the reference first

    def columns(self) -> dict[str, list[Any]]:
        """The rows as :func:`kvjax.evaluation.records.columns`: a column a number."""
        return records.columns(self.rows)

    def to_pandas(self) -> Any:
        """The columns as a `pandas.DataFrame`.

        Raises:
            ImportError: if pandas is not installed.
        """
        if importlib.util.find_spec("pandas") is None:
            raise ImportError(
                "to_pandas needs the package pandas: pip install pandas, or use "
                "columns()."
            )
        return importlib.import_module("pandas").DataFrame(self.columns())


def of_windows(layers: fidelity.LayerFidelity, name: str) -> Interval:
    """The mean of a field over layers and heads; rows are the independent samples."""
    return OF_LAYERS[name](getattr(layers, name).mean((0, 2)))


def make_row(
    name: str,
    num_bytes: Bytes,
    inputs: Inputs,
    scores: Mapping[str, Sequence[float]],
    followed: continuations.Followed,
    expected: continuations.Continued,
    seconds: float,
) -> Row:
    """The row of a method.

    Args:
        name: the method's.
        num_bytes: read, moved and held.
        inputs: what was asked.
        scores: of its answers, by when the questions came.
        followed: what it lost against the reference.
        expected: what the reference chose.
        seconds: its prefill's.
    """
    layers = followed.layers
    window_means = followed.log_probs.mean(1)
    kl = followed.agreement.kl
    asked: dict[str, Any] = {}
    for when, found in scores.items():
        asked |= _of_tasks(inputs, found, SUFFIX[when])
    return Row(
        method=name,
        bytes_read=num_bytes.read,
        bytes_measured=num_bytes.measured,
        bytes_held=num_bytes.device,
        kl=statistics.amount_interval(kl.mean(1)),
        kl_p99=percentiles.percentile_interval(kl),
        top1_agreement=statistics.share_interval(followed.agreement.top1.mean(1)),
        tokens_before_difference=percentiles.count_interval(
            followed.tokens_before_difference, expected.chosen.shape[1]
        ),
        perplexity=statistics.perplexity(window_means),
        nats_lost=statistics.paired_difference(
            expected.predicted.log_probs.mean(1), window_means
        ),
        output_error=of_windows(layers, "error"),
        dropped_mass=of_windows(layers, "dropped"),
        support=of_windows(layers, "support"),
        proved_exact=of_windows(layers, "exact"),
        full_steps=statistics.share_interval(layers.refreshed.mean(0)),
        tokens_per_second=float(np.median(followed.tokens_per_second)),
        prefill_seconds=seconds,
        chain_links=inputs.chain[0].links,
        prompt_share=num_bytes.prompt_share if num_bytes.prompt_share < 1 else None,
        **asked,
        **_of_host(num_bytes, layers),
    )


def _of_host(num_bytes: Bytes, layers: fidelity.LayerFidelity) -> dict[str, Any]:
    """The fields of a row whose method keeps something in the host's memory."""
    if not num_bytes.host:
        return {}
    # Of layers that keep nothing there none was asked for.
    asked, moved = layers.asked.sum(0), layers.moved.sum(0)
    found = {"bytes_in_host": num_bytes.host, "bytes_moved": num_bytes.moved}
    if np.all(asked > 0):
        found["pages_found"] = statistics.share_interval(1 - moved / asked)
    return found


def _of_tasks(inputs: Inputs, scores: Sequence[float], suffix: str) -> dict[str, Any]:
    """The fields of a row that are of answers, to questions that come at one time."""
    rest = iter(scores)
    own, passkey, multikey, links = (
        list(itertools.islice(rest, len(getattr(inputs, task)))) for task in TASKS
    )
    found = {
        "passkey": statistics.proportion(passkey),
        "multikey": statistics.proportion(multikey),
        "chain": statistics.share_interval(links),
        "own": statistics.proportion(own) if own else None,
    }
    depths = {
        "passkey": by_depth(inputs.passkey, passkey),
        "multikey": by_depth(inputs.multikey, multikey),
    }
    found = {name + suffix: value for name, value in found.items()}
    return found | {f"{name}{suffix}_by_depth": x for name, x in depths.items()}


_AGAINST_REFERENCE = ("kl", "kl_p99", "top1_agreement", "tokens_before_difference")
_AGAINST_REFERENCE += ("output_error", "dropped_mass")
_AGAINST_REFERENCE += ("support", "proved_exact", "full_steps")


def reference_row(row: Row) -> Row:
    """The reference's row: what it is against itself is known, and no sample."""
    means = {name: getattr(row, name) for name in _AGAINST_REFERENCE}
    return row._replace(
        **{name: Interval(x.mean, x.mean, x.mean, x.n) for name, x in means.items()}
    )


def by_depth(examples: Sequence[Example], scores: Sequence[float]) -> ByDepth:
    """`(depth, correct, asked)` of each depth, from the start of the prompt on."""
    counts: dict[float, list[int]] = {}
    for example, reached in zip(examples, scores, strict=True):
        count = counts.setdefault(example.depth, [0, 0])
        count[0] += reached == 1
        count[1] += 1
    return tuple(
        (depth, correct, asked) for depth, (correct, asked) in sorted(counts.items())
    )
