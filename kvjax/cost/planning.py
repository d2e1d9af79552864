"""A plan of what a model takes at a context under a method, before it is allocated.

Bytes of states are those of the very buffers that `kvjax.decoding.reader` would
allocate, by `jax.eval_shape`; bytes of a step are the methods' own `traffic`.
Temporaries are an estimate, and a rate is what the memory's bandwidth allows:
arithmetic is not counted.
"""

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax.numpy as jnp

from kvjax import accounting, parallel
from kvjax.decoding.reader import layer_specs
from kvjax.interface import CacheSpec, DecoderLM, Method


class Device(NamedTuple):
    """One accelerator."""

    memory: int  # bytes that a program can have
    bandwidth: int  # bytes a second, of that memory


# By the data sheets of NVIDIA (T4, L4, A100 SXM, H100 SXM, H200 SXM) and the pages of
# Google Cloud on each TPU (one chip). Memory of two TPUs as the compiler has it: libtpu
# 0.0.52 refuses what exceeds 15.75 GiB on v5e and 31.24 GiB on v6e.
_GB = 10**9
DEVICES = {
    "T4": Device(16 * _GB, 320 * _GB),
    "L4": Device(24 * _GB, 300 * _GB),
    "v5e-1": Device(int(15.75 * 2**30), 819 * _GB),
    "v6e-1": Device(int(31.24 * 2**30), 1640 * _GB),
    "v4": Device(32 * 2**30, 1200 * _GB),
    "v5p": Device(95 * _GB, 2765 * _GB),
    "A100-40": Device(40 * _GB, 1555 * _GB),
    "A100-80": Device(80 * _GB, 2039 * _GB),
    "H100": Device(80 * _GB, 3350 * _GB),
    "H200": Device(141 * _GB, 4800 * _GB),
}
LINK = 32 * _GB  # bytes a second from the host's memory: PCIe 4.0, 16 lanes
# Share of a device's memory that a plan leaves free: fragments between buffers, the
# runtime's own, and what the estimate of temporaries leaves out.
MARGIN = 0.1


def device(text: str) -> tuple[str, Device]:
    """Returns the name and sizes of a known device, or of one as `name:GB:GB/s`.

    Raises:
        ValueError: for a name that is not known and gives no sizes, and for sizes that
            are no positive numbers.
    """
    name, *sizes = text.split(":")
    if not sizes and name in DEVICES:
        return name, DEVICES[name]
    form = "name:GB:GB/s, as mine:48:864"
    if not sizes:
        known = ", ".join(DEVICES)
        raise ValueError(
            f"unknown device={text!r}: choose one of {known}, or give {form}."
        )
    try:
        memory, bandwidth = (float(size) for size in sizes)
    except ValueError as error:
        raise ValueError(f"device={text!r} must read {form}.") from error
    if not name or not (0 < memory < math.inf and 0 < bandwidth < math.inf):
        raise ValueError(f"device={text!r} must read {form}, both above 0.")
    return name, Device(round(memory * _GB), round(bandwidth * _GB))


def devices(texts: Iterable[str]) -> dict[str, Device]:
    """Returns devices by name, each of :func:`device`'s spelling.

    Raises:
        ValueError: as :func:`device`, and for one name with two sizes.
    """
    found: dict[str, Device] = {}
    for text in texts:
        name, sizes = device(text)
        if found.setdefault(name, sizes) != sizes:
            raise ValueError(f"device={text!r}: {name} is given with other sizes too.")
    return found


class Weights(NamedTuple):
    """Bytes of a model's weights: `read` are those that a step must read."""

    held: int
    read: int


class Plan(NamedTuple):
    """Bytes of one model under one method, all rows and layers together.

    States are what the device holds of them; over a mesh, each of its devices.
    """

    weights: Weights
    prompt_state: int  # while the prompt is read
    ending_state: int  # while `finish` makes the one from the other, a layer at a time
    decode_state: int
    prompt_temporaries: int  # estimates, both
    decode_temporaries: int
    kv: int  # keys and values that a step reads
    metadata: int  # what it reads only to choose
    batch: int
    host: int = 0  # of states at most, in the host's memory
    link: int = 0  # that a step reads from there, if the device has none of it
    prompt_share: float = 1.0  # of the query-key pairs of a prompt, those attended to
    sent: int = 0  # by a step to the other devices of a mesh

    @property
    def step_bytes(self) -> int:
        """Read for one step of all rows: the weights once, every row's cache."""
        return self.weights.read + self.kv + self.metadata

    @property
    def prompt_bytes(self) -> int:
        """Held while the prompt is read."""
        return self.weights.held + self.prompt_state + self.prompt_temporaries

    @property
    def decode_bytes(self) -> int:
        """Held while tokens are generated."""
        return self.weights.held + self.decode_state + self.decode_temporaries

    @property
    def peak(self) -> int:
        """The most that is held at any moment."""
        ending = self.weights.held + self.ending_state
        return max(self.prompt_bytes, ending, self.decode_bytes)


def plan(
    decoder: DecoderLM,
    method: Method,
    *,
    weights: Weights,
    mlp_width: int,
    context: int,
    new_tokens: int = 128,
    batch: int = 1,
    chunk_size: int = 512,
) -> Plan:
    """Bytes for prompts and generated tokens of `context` together.

    Args:
        decoder: of any size; no weights are needed.
        method: any that suits the model.
        weights: bytes of the model's.
        mlp_width: elements of the widest hidden state inside of a layer.
        context: tokens of a row when the last one is generated.
        new_tokens: generated ones among them.
        batch: rows.
        chunk_size: prompt tokens at once.

    Raises:
        ValueError: unless `1 <= new_tokens < context`, and for sizes below 1.
    """
    for name, value in (("batch", batch), ("chunk_size", chunk_size)):
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1.")
    if not 1 <= new_tokens < context:
        raise ValueError(f"{new_tokens=} must be in [1, {context=}).")
    prompt = context - new_tokens
    specs = layer_specs(decoder, batch, prompt, new_tokens)
    mesh, own = parallel.of(decoder), specs[0]
    if mesh is not None:
        own = parallel.share_of(method, mesh, own)
        mlp_width = -(-mlp_width // parallel.ways(mesh))
    before, after = zip(*accounting.held(method, specs, mesh), strict=True)
    # Layer by layer: those before are small already, one is held in both shapes, and
    # what it has in the host's memory is on the device meanwhile.
    ending = max(
        _on_device(after[: layer + 1]) + _on_device(before[layer:]) + one.host
        for layer, one in enumerate(before)
    )
    read = accounting.traffic(method, decoder, context, new_tokens)
    granule = method.hooks.granule or 1
    chunk_size = -(-chunk_size // granule) * granule
    if method.reread is not None:
        chunk_size = max(chunk_size, min(method.reread.chunk, context))
    itemsize = jnp.dtype(own.dtype).itemsize
    logits = 4 * batch * decoder.vocab_size  # whole on every device
    # A chunk's hidden states and heads; and XLA copies a layer's cache up to twice for
    # the scatter of a chunk (626 to 1,164 MB of 537 on v5e: NOTES).
    heads = (own.num_q_heads + 2 * own.num_kv_heads) * own.head_dim
    wide = (2 * decoder.width + 3 * mlp_width + heads) * itemsize
    fed = own.copies
    rows, count = (fed.rows(chunk_size), fed.count) if fed else (chunk_size, 1)
    # Of attention that merges, what is in the host's memory comes in small blocks.
    far = 0 if decoder.alpha == 1 else 1
    layer = max(held.device + far * held.host for held in before)
    prompt_temporaries = own.batch * rows * wide + 2 * layer + logits
    # One layer's attention logits twice, in float32, where no kernel keeps them small.
    decode_temporaries = 8 * count * own.batch * own.num_q_heads * context + 2 * logits
    return Plan(
        weights,
        _on_device(before),
        _on_device(before) if before == after else ending,
        _on_device(after),
        prompt_temporaries,
        decode_temporaries,
        own.batch * read.kv,
        own.batch * read.metadata,
        batch,
        max(sum(x.host for x in held) for held in (before, after)),
        own.batch * read.link,
        accounting.prompt_share(method, decoder, prompt),
        sum(one.sent for one in exchanges(decoder, method, specs)),
    )


def exchanges(
    decoder: Any, method: Method, specs: Iterable[CacheSpec]
) -> list[parallel.Exchange]:
    """Returns what the devices of a mesh tell each other in a step; of one, nothing."""
    mesh = parallel.of(decoder)
    if mesh is None:
        return []
    specs = list(specs)
    found = list(decoder.exchanges(specs[0].batch))
    for spec in specs:
        found += parallel.exchanged(method, mesh, spec)
    return found


def _on_device(held: Iterable[accounting.Held]) -> int:
    return sum(x.device for x in held)


def room(device: Device, margin: float = MARGIN) -> int:
    """Bytes of a device's memory that may be used: all but a share of it.

    Raises:
        ValueError: unless the margin is in [0, 1).
    """
    if not 0 <= margin < 1:
        raise ValueError(f"{margin=} must be in [0, 1), a share of the memory.")
    return device.memory - math.floor(margin * device.memory)


def fits(plan: Plan, device: Device, margin: float = MARGIN) -> bool:
    """Says whether the peak leaves a share of the device's memory free."""
    return plan.peak <= room(device, margin)


def tokens_per_second(plan: Plan, device: Device, link: float = LINK) -> float:
    """Most tokens a second, all rows together, that the bytes of a step allow.

    Those that come over a link of `link` bytes a second come first, all of them.
    """
    seconds = plan.step_bytes / device.bandwidth + plan.link / link
    return plan.batch / seconds


def gigabytes(count: int) -> str:
    """Returns bytes in units of 1e9, with two digits where a small model has 0.00."""
    return f"{count / 1e9:.2f}" if count >= 1e8 else f"{count / 1e9:.2g}"
