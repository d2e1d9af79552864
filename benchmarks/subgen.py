r"""What SubGen's theorem promises on the keys of a model, and what its sums are off by.

    python benchmarks/subgen.py --model embedded-softmax --model smollm2 --json F

Each call adds an entry a model to the file. A window of held-out text is read under
full attention; of every layer the tokens between sinks and window are folded, and asked
for by the newest queries. By layer: delta |x| of the theorem, twice the largest
distance of a key to its centre times the length of a scaled query, in nats; the keys
that it asks of each cluster for an error of 1, as a logarithm beside log n; how far log
tau is from log Z, and z from N, over seeds; and the radius of 16 centres over the
spread, of keys and of values.
"""

import argparse
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from entries import add

import kvjax
from kvjax.attention import centres
from kvjax.evaluation.claims.measure import layers
from kvjax.evaluation.tasks import needles
from kvjax.methods.subgen import bound, stream
from kvjax.methods.subgen.options import Options
from kvjax.stores.contiguous import Contiguous
from models import embedded

SEED = 60_000
FEW = 16  # centres, of keys and of values
OPTIONS = {
    "mode": "stream",
    "window": None,
    "num_sinks": 4,
    "per_cluster": 1,
    "samples": None,
    "clusters": None,
    "delta": None,
    "lam": 1.0,
    "norm_cap": False,
    "seed": 0,
}


@functools.partial(jax.jit, static_argnums=(0, 1))
def promised(options, spec, q, k, v):
    """Radii, nats of the bound, and the true sums of each layer, head and query."""
    sizes = options.split(spec)
    between = stream.is_between(sizes, k, jnp.full((k.shape[0],), k.shape[2]))
    clusters = centres.farthest_first(k, between, sizes.clusters)
    grouped = q.reshape(*k.shape[:2], -1, *q.shape[2:])
    logits = jnp.einsum("bkgtd,bksd->bkgts", grouped, k)
    logits = jnp.where(between[:, :, None, None], logits, -jnp.inf)
    log_z = jax.nn.logsumexp(logits, axis=-1)
    p = jnp.exp(logits - log_z[..., None])
    average = jnp.einsum("bkgts,bksd->bkgtd", p, v)
    held = jnp.where(between[..., None], v, 0.0)
    shape = (*k.shape[:2], -1, k.shape[2])
    root = bound.numerator(p.reshape(shape), held, sizes.samples).reshape(log_z.shape)
    keys, values = (bound.radius_over_spread(x, between, FEW) for x in (k, v))
    return bound.normaliser(clusters, q), log_z, average, root, keys, values


@functools.partial(jax.jit, static_argnums=(0, 1))
def drawn(options, spec, q, k, v, key):
    """log tau, and z / Z's factor and vector, of every query."""
    length = jnp.full((k.shape[0],), k.shape[2])
    key = jnp.broadcast_to(key, (k.shape[0], 2))
    store = Contiguous(spec, k, v, length)
    folded = stream.fold_prompt(options, options.split(spec), store, key)

    def ask(x):
        mean, log_z = stream.numerator(folded, x[:, :, None], 1.0)
        return stream.log_tau(folded, x[:, :, None], 1.0), mean, log_z

    found = jax.vmap(ask, in_axes=2, out_axes=2)(q)
    shape = (*k.shape[:2], -1, q.shape[2])
    return [x.reshape(*shape, *x.shape[4:]) for x in found]


def of_model(args, name):
    """The entry of a model."""
    model = kvjax.load(name)
    text = embedded.heldout_text()
    windows = needles.windows(
        model.tokenizer, text, context=args.context, n=1, seed=SEED
    )
    given = layers.record_inputs(model, np.array(windows, np.int32))
    spec = model.decoder.cache_spec(given.k.shape[0], args.context + 1)
    positions = jnp.arange(args.context, dtype=jnp.int32)
    positions = jnp.broadcast_to(positions, (given.k.shape[0], args.context))
    q, k = (spec.rope(x.astype(jnp.float32), positions) for x in (given.q, given.k))
    q, v = spec.sm_scale * q[:, :, -args.queries :], given.v.astype(jnp.float32)
    options = Options(budget=args.budget, **OPTIONS)
    nats, log_z, average, root, *radii = map(
        np.asarray, promised(options, spec, q, k, v)
    )
    sizes = options.split(spec)
    tokens = args.context - sizes.exact
    off, squares = [], 0.0
    for seed in range(args.seeds):
        key = jax.random.key_data(jax.random.key(seed))
        tau, mean, factor = map(np.asarray, drawn(options, spec, q, k, v, key))
        off.append(np.abs(tau - log_z))
        z = np.exp(factor - log_z)[..., None] * mean
        squares = squares + ((z - average) ** 2).sum(-1) / args.seeds
    wanted = np.asarray(bound.log_samples(jnp.asarray(nats), tokens, 1.0))

    def by_layer(x, how=np.median):
        return [round(float(how(layer)), 3) for layer in x]

    return {
        "model": name,
        "context": args.context,
        "budget": args.budget,
        "sizes": sizes._asdict(),
        "folded": tokens,
        "log_n": float(np.log(tokens)),
        "exponent_below_log_n": float((2 * nats < np.log(tokens)).mean()),
        "keys_a_cluster_below_n": float((wanted < np.log(tokens)).mean()),
        "nats": by_layer(nats),
        "least_nats": float(nats.min()),
        "log_keys_a_cluster": by_layer(wanted),
        "off_log_tau": by_layer(np.moveaxis(np.array(off), 0, 1)),
        "off_log_tau_p95": by_layer(
            np.moveaxis(np.array(off), 0, 1), lambda x: np.percentile(x, 95)
        ),
        "worst_off_over_bound": float((np.array(off) / nats).max()),
        "numerator_bound": by_layer(root / np.linalg.norm(average, axis=-1)),
        "numerator_off": by_layer(np.sqrt(squares) / np.linalg.norm(average, axis=-1)),
        "seeds": args.seeds,
        "radius_over_spread": {
            "keys": by_layer(radii[0], np.mean),
            "values": by_layer(radii[1], np.mean),
        },
        "keys_cluster_more": float((radii[0] < radii[1]).mean()),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", action="append", required=True)
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--budget", type=int, default=256)
    parser.add_argument("--queries", type=int, default=32)
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--json", type=pathlib.Path, required=True)
    args = parser.parse_args()
    for name in args.model:
        entry = of_model(args, name)
        add(args.json, entry)
        print(entry)


if __name__ == "__main__":
    main()
