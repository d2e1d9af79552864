"""A transform: layers with budgets of their own, of one total (PyramidKV)."""

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from jaxtyping import Array, Float, Int

from kvjax.attention.typed import typed
from kvjax.interface import (
    RECIPES,
    CacheSpec,
    Diagnostics,
    Method,
    Recipe,
    Rereading,
    State,
    Traffic,
)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Kind:
    """Says which method a layer is under: its budget, or its place in a list.

    A pytree without leaves. Layers of one kind share their programs.
    """

    number: int


class Layer(NamedTuple):
    """State of :func:`layer_budgets`, one layer."""

    kind: Kind
    state: Any  # of the layer's method


@dataclasses.dataclass(frozen=True)
class Pyramid:
    """Methods of one recipe, whose budgets fall from layer to layer, or are listed."""

    recipe: Recipe
    beta: float
    budgets: tuple[int, ...]  # of each layer; none: a pyramid

    @property
    def budget(self) -> int:
        """The budget of the method that the layers share out, their mean."""
        return self.recipe.options["budget"]

    @property
    def page(self) -> int:
        """Tokens that a budget is a multiple of."""
        return self.recipe.options.get("page_size", 1)

    @property
    def certain(self) -> int:
        """Tokens that every layer keeps beside what is shared out."""
        if self.page > 1:
            return 0
        kept = {key: self.recipe.options.get(key, 0) for key in ("window", "num_sinks")}
        if None in kept.values():
            raise ValueError(
                f"layer_budgets shares out what {self.recipe.spec} has beside its "
                "window and sinks, and these follow the budget: give it window=... and "
                "num_sinks=..."
            )
        return sum(kept.values())

    def kind(self, spec: CacheSpec) -> Kind:
        """Returns the kind of the spec's layer."""
        layers = spec.num_layers
        if layers <= spec.layer:
            raise ValueError(
                f"budgets are shared out among a model's layers, and the spec says "
                f"num_layers={layers} with layer={spec.layer}: "
                "kvjax.interface.layer_specs gives specs that know both."
            )
        budgets = self.budgets
        check_number(budgets, layers)
        if not budgets:
            budgets = pyramid(
                self.budget,
                layers,
                beta=self.beta,
                certain=min(self.certain, self.budget),
                page=self.page,
                most=spec.capacity,
            )
        return Kind(budgets[spec.layer])

    def method(self, kind: Kind) -> Method:
        """Returns the method of a kind."""
        return self.recipe.remake(budget=kind.number)


@dataclasses.dataclass(frozen=True)
class Listed:
    """A method for each layer."""

    methods: tuple[Method, ...]

    def kind(self, spec: CacheSpec) -> Kind:
        """Returns the kind of the spec's layer: the first place of its method."""
        check_number(self.methods, spec.num_layers or len(self.methods))
        if spec.layer >= len(self.methods):
            raise ValueError(
                f"{len(self.methods)} layers were given and the model has a layer "
                f"{spec.layer}: give one for each."
            )
        return Kind(self.methods.index(self.methods[spec.layer]))

    def method(self, kind: Kind) -> Method:
        """Returns the method of a kind."""
        return self.methods[kind.number]


Plan = Pyramid | Listed


@typed
def layer_budgets(
    method: Method | Sequence[Method], *, beta: float = 20.0, budgets: str = ""
) -> Method:
    """Gives every layer a budget of its own, with the same total (PyramidKV).

    Lower layers spread their attention over the text, upper ones gather it on a few
    tokens: budgets fall linearly from the first layer to the last. With the budget b of
    `method`, of which w tokens are certain (its `window` and `num_sinks`), the last
    layer has w + (b - w) / beta, the first w + (b - w) * (2 - 1 / beta). No layer gets
    more than the capacity; what is over goes to the upper ones. Budgets are rounded to
    tokens, or to pages, so that they add up to b for each layer.

    Args:
        method: one with a `budget`, made of a spec: `kvjax.parse("snapkv:budget=256")`.
            Or a list of methods, one for each layer: any of equal `rows` that read a
            prompt alike, all of them once, or all again in the same chunks.
        beta: how steep the pyramid is: the even budget over that of the last layer; 1
            is `method`. Official: 20.
        budgets: that of each layer, with slashes between: "512/256/128/128". The
            pyramid if empty.

    Returns:
        A :class:`kvjax.Method` over :class:`Layer`.

    State: that of the method in charge of the layer.
    Reads per step and layer: as the method in charge of the layer.
    Exact when: the methods of all layers are; budget >= capacity.

    Raises:
        ValueError: unless beta >= 1, `method` has a budget and was made of a spec, and
            it takes the smallest of the budgets; for a list of no method, of methods of
            different rows, or of such that do not read a prompt again alike; from
            `init`, unless there is one for each layer.

    Source:
        Cai et al., "PyramidKV: Dynamic KV Cache Compression based on Pyramidal
        Information Funneling", arXiv:2406.02069, Sec. 4.2.
    Deviations:
        The capacity takes the place of each prompt's length as the most that a layer
        gets. The official code rounds the step between layers down, and so keeps fewer
        tokens than it was given.

    Example:
        >>> method = kvjax.layer_budgets(kvjax.parse("snapkv:budget=256"))
        >>> budgets = [96] * 20 + [40] * 10
        >>> method = kvjax.layer_budgets([kvjax.snapkv(budget=b) for b in budgets])
    """
    plan, methods = make_plan(method, beta, budgets)
    rewinds = None
    if all(one.rewind for one in methods):
        rewinds = functools.partial(rewind, plan)
    return Method(
        init=functools.partial(init, plan),
        prefill=functools.partial(prefill, plan),
        finish=functools.partial(finish, plan),
        append=functools.partial(append, plan),
        inspect_step=functools.partial(inspect_step, plan),
        traffic=functools.partial(traffic, plan),
        rows=methods[0].rows,
        rewind=rewinds,
        exact_prompt=all(one.exact_prompt for one in methods),
        renumbers=all(one.renumbers for one in methods),
        reread=second_reading(plan, methods),
    )


def make_plan(
    method: Method | Sequence[Method], beta: float, budgets: str
) -> tuple[Plan, tuple[Method, ...]]:
    """Checks the options; returns which layer gets what, and methods of all kinds."""
    if not isinstance(method, Method):
        methods = tuple(method)
        if not (methods and all(isinstance(one, Method) for one in methods)):
            raise ValueError(
                f"{method!r} must be a method, or a list of methods, one for each "
                "layer, as [kvjax.snapkv(budget=b) for b in (96, 64, 48)]."
            )
        if budgets:
            raise ValueError(
                f"{budgets=} are those of one method; a list has {len(methods)}."
            )
        if len({one.rows for one in methods}) > 1:
            raise ValueError(
                f"layers of {sorted({one.rows for one in methods})} rows a step cannot "
                "be in one model: give all methods the same."
            )
        return Listed(methods), methods
    recipe = RECIPES.get(method)
    if recipe is None:
        raise ValueError(
            f"{method} was made by a call, which hides its budget: make it of a spec, "
            "as kvjax.parse('layer_budgets+snapkv:budget=256'), or give a list of "
            "methods, one for each layer."
        )
    if "budget" not in recipe.options:
        raise ValueError(
            f"{recipe.spec} has no budget that could be shared out: wrap a method that "
            "has one, as in 'layer_budgets+snapkv:budget=256', or give a list of "
            "methods, one for each layer."
        )
    if not 1 <= beta < float("inf"):
        raise ValueError(f"{beta=} must be finite and at least 1, which is no pyramid.")
    plan = Pyramid(recipe, beta, read_budgets(budgets))
    smallest = min(plan.budgets, default=plan.certain + last(plan))
    try:
        return plan, (method, plan.method(Kind(smallest)))
    except ValueError as error:
        raise ValueError(
            f"the layer of the smallest budget cannot have {smallest}: {error}"
        ) from error


def second_reading(plan: Plan, methods: Sequence[Method]) -> Rereading | None:
    """Returns the second reading of all layers, which they do together; or None."""
    first, *others = methods
    for other in others:
        if _way(first) != _way(other):
            raise ValueError(
                f"{first} and {other} do not read a prompt again alike, as the layers "
                "of one model must: give all layers methods that read it once, or all "
                "the same with one `chunk`."
            )
    if first.reread is None:
        return None
    return first.reread._replace(prefill=functools.partial(read_again, plan))


def _way(method: Method) -> tuple[int, str] | None:
    """Returns what layers must have in common to read a prompt again."""
    again = method.reread
    return None if again is None else (again.chunk, again.words)


def read_budgets(text: str) -> tuple[int, ...]:
    """Reads whole numbers with slashes between them."""
    try:
        return tuple(int(part) for part in text.split("/")) if text else ()
    except ValueError:
        raise ValueError(
            f"budgets={text!r} must be whole numbers with slashes, as 512/256/128."
        ) from None


def check_number(listed: Sequence[Any], layers: int) -> None:
    """Raises ValueError unless the list is empty, or has something for each layer."""
    if listed and len(listed) != layers:
        raise ValueError(
            f"{len(listed)} layers were given and the model has {layers}: give one for "
            "each."
        )


def last(plan: Pyramid) -> int:
    """Returns what the last layer gets of the tokens that are shared out, at least."""
    shared = max(plan.budget - plan.certain, 0)
    return max(int(shared / plan.beta) // plan.page, 1) * plan.page


def pyramid(
    budget: int,
    num_layers: int,
    *,
    beta: float,
    certain: int = 0,
    page: int = 1,
    most: int | None = None,
) -> tuple[int, ...]:
    """Returns budgets that fall linearly and add up to `budget` for each layer.

    Args:
        budget: their mean, tokens.
        num_layers: L.
        beta: the mean over the last one, once `certain` is taken from both.
        certain: tokens of every layer.
        page: what is shared out comes in multiples of it, and each layer has one.
        most: of any layer, unless the mean is above it.
    """
    if num_layers == 1:
        return (budget,)
    shared = budget - certain
    # Sec. 4.2: k_(m-1) = k_total / (beta * m), k_0 = 2 * k_total / m - k_(m-1).
    upper = min(max(shared / beta, page), shared)
    lower = 2 * shared - upper
    if most is not None:
        lower = min(lower, max(most - certain, shared))
    upper = 2 * shared - lower
    # The sum of the first `layer` of them, in pages: rounding it, not them, keeps it.
    fall = (lower - upper) / (num_layers - 1)
    sums = [
        round((layer * lower - fall * layer * (layer - 1) / 2) / page)
        for layer in range(num_layers + 1)
    ]
    pairs = itertools.pairwise(sums)
    return tuple(certain + page * (end - start) for start, end in pairs)


def init(plan: Plan, spec: CacheSpec, weights: Any = None) -> Layer:
    """Makes the state of the layer's method, and notes which that is."""
    kind = plan.kind(spec)
    return Layer(kind, plan.method(kind).init(spec, weights))


def prefill(
    plan: Plan,
    state: Layer,
    q: Float[Array, "B Hq T D"],
    k: Float[Array, "B Hkv T D"],
    v: Float[Array, "B Hkv T D"],
    lengths: Int[Array, "B"],
) -> tuple[Layer, Float[Array, "B Hq T D"]]:
    """Leaves the prompt to the layer's method."""
    inner, out = plan.method(state.kind).prefill(state.state, q, k, v, lengths)
    return state._replace(state=inner), out


def read_again(
    plan: Plan,
    state: Layer,
    q: Float[Array, "B Hq T D"],
    k: Float[Array, "B Hkv T D"],
    v: Float[Array, "B Hkv T D"],
    lengths: Int[Array, "B"],
) -> tuple[Layer, Float[Array, "B Hq T D"]]:
    """Leaves the second reading to the layer's method."""
    again = plan.method(state.kind).reread
    if again is None:
        raise ValueError("a layer's method reads no prompt again.")
    inner, out = again.prefill(state.state, q, k, v, lengths)
    return state._replace(state=inner), out


def finish(plan: Plan, state: Layer) -> Layer:
    """Leaves the end of the prompt to the layer's method."""
    return state._replace(state=plan.method(state.kind).finish(state.state))


def append(
    plan: Plan,
    state: Layer,
    k: Float[Array, "B Hkv T D"],
    v: Float[Array, "B Hkv T D"],
) -> Layer:
    """Leaves the next token to the layer's method."""
    return state._replace(state=plan.method(state.kind).append(state.state, k, v))


def inspect_step(
    plan: Plan, state: Layer, q: Float[Array, "B Hq T D"]
) -> tuple[Layer, Float[Array, "B Hq T D"], Diagnostics]:
    """Attends as the layer's method does."""
    method = plan.method(state.kind)
    inner, out, diagnostics = method.inspect_step(state.state, q)
    return state._replace(state=inner), out, diagnostics


def rewind(plan: Plan, state: Layer, count: Int[Array, "B"], most: int) -> State:
    """Takes tokens back, by the layer's method."""
    taken_back = plan.method(state.kind).rewind
    if taken_back is None:
        raise ValueError("a layer's method takes no token back.")
    return state._replace(state=taken_back(state.state, count, most))


def traffic(plan: Plan, spec: CacheSpec, length: int) -> Traffic:
    """Counts the bytes of the layer's method."""
    return plan.method(plan.kind(spec)).traffic(spec, length)
