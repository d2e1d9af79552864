"""Speculative sampling draws from the target's distribution, whatever was drafted."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
from chi_square import distance

from kvjax.decoding import speculative

V, DRAFTS = 3, 2
TOKENS = range(V)
ROWS = 20_000
BEFORE = [b for n in range(DRAFTS + 1) for b in itertools.product(TOKENS, repeat=n)]
# Two chains: a token's distribution goes with all before it. In one place the target
# excludes a token that is often drafted, and mostly draws one that never is.
RNG = np.random.default_rng(5)
TARGET, DRAFTED = ({b: RNG.dirichlet([0.7] * V) for b in BEFORE} for _ in "td")
TARGET[(1,)], DRAFTED[(1,)] = np.array([0.0, 0.3, 0.7]), np.array([0.6, 0.4, 0.0])
WANTED = {
    tokens: np.prod([TARGET[tokens[:i]][token] for i, token in enumerate(tokens)])
    for tokens in itertools.product(TOKENS, repeat=DRAFTS + 1)
}


def test_the_rule_is_exact_over_all_that_can_happen():
    """Every draft, how much of it holds, and every token instead, in float64."""
    found = dict.fromkeys(WANTED, 0.0)

    def ends(tokens, chance):
        """Adds the chance of these tokens, gone on with by the target itself."""
        for whole in WANTED:
            if whole[: len(tokens)] == tokens:
                own = range(len(tokens), len(whole))
                rest = [TARGET[whole[:i]][whole[i]] for i in own]
                found[whole] += chance * np.prod(rest)

    def drafted(tokens, chance):
        """Goes through what may follow tokens of a draft that hold."""
        if len(tokens) == DRAFTS:
            return ends(tokens, chance)
        q = DRAFTED[tokens]
        p, q_there = jax.device_put((TARGET[tokens], q))
        holds = np.asarray(speculative.acceptance(p, q_there))
        instead = np.asarray(speculative.remainder(p, q_there))
        assert holds.dtype == instead.dtype == np.float64
        for token in TOKENS:
            refused = chance * q[token] * (1 - holds[token])
            for other in TOKENS:
                ends((*tokens, other), refused * instead[other])
            drafted((*tokens, token), chance * q[token] * holds[token])
        return None

    with jax.enable_x64(True):
        drafted((), 1.0)
    for tokens, wanted in WANTED.items():
        np.testing.assert_allclose(found[tokens], wanted, rtol=1e-12, atol=1e-15)


def tables(chain):
    """The logits of a chain, by how many tokens come before: `(V, ..., V)`."""
    found = []
    for size in range(DRAFTS + 1):
        rows = [chain[b] for b in itertools.product(TOKENS, repeat=size)]
        with np.errstate(divide="ignore"):
            logits = np.log(np.array(rows, np.float32))
        found.append(logits.reshape((V,) * (size + 1)))
    return [jax.device_put(x) for x in found]


@functools.partial(jax.jit, static_argnums=1)
def sampled(seed, drafts, target, drafted):
    """Three tokens of many rows, of drafts that the rule decides over."""

    def behind(table, tokens):
        return jnp.broadcast_to(table[tuple(tokens)], (ROWS, V))

    rows = jax.vmap(jax.random.fold_in, (None, 0))(
        jax.random.key(seed), jnp.arange(ROWS)
    )
    keys = speculative.place_keys(rows, jnp.zeros(ROWS, jnp.int32), DRAFTS + 1)
    tokens, by = [], []
    for place in range(DRAFTS):
        by.append(behind(drafted[place], tokens))
        tokens.append(speculative.draw(keys[:, place], by[-1]))
    logits = [behind(target[i], tokens[:i]) for i in range(DRAFTS + 1)]
    accepted, instead = speculative.decide_by_chance(
        keys,
        jnp.stack(logits, axis=1),
        jnp.stack(by, axis=1),
        jnp.stack([jnp.zeros_like(tokens[0]), *tokens], axis=1),
        jnp.full(ROWS, drafts, jnp.int32),
    )
    found = [jnp.where(i < accepted, x, instead) for i, x in enumerate(tokens)]
    found.append(instead)
    for place in range(1, DRAFTS + 1):  # what is behind, the target draws
        key = jax.random.fold_in(jax.random.key(seed + 1), place)
        own = jax.random.categorical(key, behind(target[place], found[:place]))
        found[place] = jnp.where(place > accepted, own.astype(jnp.int32), found[place])
    return accepted, jnp.stack(found, axis=1)


def test_drawn_tokens_have_the_distribution_of_the_target():
    """By chi-square, over seeds; of drafts of two tokens, and of one."""
    chains = tables(TARGET), tables(DRAFTED)
    for seed, drafts in ((0, 2), (2, 2), (4, 1)):
        accepted, tokens = sampled(seed, drafts, *chains)
        assert distance(np.asarray(tokens), WANTED) < 4
        assert np.unique(accepted).tolist() == list(range(drafts + 1))


def test_equal_distributions_accept_everything():
    """Where rounding leaves nothing to take its place, the target's own is drawn."""
    p = jnp.array([[0.5, 0.5, 0.0]])
    np.testing.assert_array_equal(speculative.remainder(p, p), p)
    np.testing.assert_array_equal(speculative.acceptance(p, p), jnp.ones_like(p))
