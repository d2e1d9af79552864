"""LoRA training of the family: weights that stay, and low-rank matrices beside them.

Parameters that are trained lie flat in one dict, by their names in PEFT's files and in
their layout there: A is (R, I), B (O, R).
"""

import dataclasses
import functools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from kvjax.interface import CacheSpec, Params
from models.llama import adapters
from models.llama.adapters import Options
from models.llama.config import LlamaConfig
from models.llama.low_rank import Beside
from models.llama.model import Attention, LlamaDecoder
from models.llama.weights import Entry, layout

_DOWN, _UP = "lora_A.weight", "lora_B.weight"


@functools.cache
def _modules(config: LlamaConfig, is_kernel: bool) -> dict[str, Entry]:
    """Matrices, or norms, by the names of their modules."""
    return {
        entry.name.removesuffix(".weight"): entry
        for entry in layout(config)
        if entry.is_kernel == is_kernel
        and (is_kernel or entry.name.endswith("norm.weight"))
    }


@dataclasses.dataclass(frozen=True)
class AdaptedDecoder:
    """A :class:`kvjax.training.step.AdaptedLM`: a Llama beside which adapters learn.

    Raises:
        ValueError: if a target is no matrix of the model, or no norm.
    """

    decoder: LlamaDecoder
    options: Options

    def __post_init__(self):
        targets = self.options.targets
        names = targets.target_modules
        for one in [names] if isinstance(names, str) else [(name,) for name in names]:
            alone = targets._replace(target_modules=one)
            self._check("target_modules", one, alone.adapted(self._matrices), "matrix")
        for name in targets.modules_to_save:
            alone = targets._replace(modules_to_save=(name,))
            self._check("modules_to_save", name, alone.saved(self._norms), "norm")

    def _check(self, key: str, name: Any, matched: list[str], kind: str) -> None:
        if matched:
            return
        every = self._matrices if kind == "matrix" else self._norms
        known = sorted({module.rpartition(".")[2] for module in every})
        shown = name if isinstance(name, str) else name[0]
        raise ValueError(
            f"lora.{key}={shown} is no {kind} of the model: name some of "
            f"{', '.join(known)}."
        )

    @property
    def _matrices(self) -> dict[str, Entry]:
        return _modules(self.decoder.config, True)

    @property
    def _norms(self) -> dict[str, Entry]:
        return _modules(self.decoder.config, False)

    @property
    def num_layers(self) -> int:
        return self.decoder.num_layers

    @property
    def vocab_size(self) -> int:
        return self.decoder.vocab_size

    @property
    def context(self) -> int:
        return self.decoder.context

    @property
    def alpha(self) -> float:
        return self.decoder.alpha

    def cache_spec(
        self, batch: int, capacity: int, max_new_tokens: int = 0, layer: int = 0
    ) -> CacheSpec:
        """Returns all that a method may know of one layer of the model."""
        return self.decoder.cache_spec(batch, capacity, max_new_tokens, layer)

    def frozen_shapes(self) -> Params:
        """`jax.ShapeDtypeStruct` of the weights of the model."""
        return self.decoder.param_shapes()

    def param_shapes(self) -> Params:
        """`jax.ShapeDtypeStruct` of every parameter that is trained, float32."""
        return jax.eval_shape(self.init, 0, self.frozen_shapes())

    def init(self, seed: int, frozen: Params) -> Params:
        """Makes parameters with which the model computes what it does without them.

        A is uniform in +-1/sqrt(inputs), B is 0, and norms are those of the model.
        """
        key, params = jax.random.key(seed), {}
        rank = self.options.rank
        for index, (name, entry) in enumerate(self._adapted().items()):
            outputs, inputs = entry.shape
            edge, own = inputs**-0.5, jax.random.fold_in(key, index)
            params[f"{name}.{_DOWN}"] = jax.random.uniform(
                own, (rank, inputs), jnp.float32, -edge, edge
            )
            params[f"{name}.{_UP}"] = jnp.zeros((outputs, rank), jnp.float32)
        for name, entry in self._saved().items():
            params[f"{name}.weight"] = _at(frozen, entry).astype(jnp.float32)
        return params

    def join(self, frozen: Params, params: Params) -> Params:
        """Returns parameters of the model, in which the trained ones are beside."""
        for name, entry in self._adapted().items():
            down = params[f"{name}.{_DOWN}"].T * self.options.scale
            matrix = Beside(_at(frozen, entry), down, params[f"{name}.{_UP}"].T)
            frozen = _with(frozen, entry.path, matrix)
        for name, entry in self._saved().items():
            frozen = _with(frozen, entry.path, params[f"{name}.weight"])
        return frozen

    def hidden(
        self,
        params: Params,
        tokens: Int[Array, "B T"],
        attention: Attention,
        *,
        remat: bool = False,
    ) -> Float[Array, "B T E"]:
        """Returns final hidden states, by joined parameters."""
        return self.decoder.hidden(params, tokens, attention, remat=remat)

    def logits(
        self, params: Params, hidden: Float[Array, "*B E"]
    ) -> Float[Array, "*B V"]:
        """Returns next-token logits in float32, by joined parameters."""
        return self.decoder.logits(params, hidden)

    def save(
        self,
        params: Params,
        folder: Path,
        *,
        made_for: str,
        dtype: jax.typing.DTypeLike = "float32",
        attention_alpha: float | None = None,
    ) -> None:
        """Writes an adapter in PEFT's layout; see :func:`models.llama.adapters.write`.

        Raises:
            OSError: if it cannot be written.
        """
        tensors = {name: np.asarray(x).astype(dtype) for name, x in params.items()}
        adapters.write(
            folder,
            tensors,
            self.options,
            made_for=made_for,
            attention_alpha=attention_alpha,
        )

    def _adapted(self) -> dict[str, Entry]:
        chosen = self.options.targets.adapted(self._matrices)
        return {name: self._matrices[name] for name in chosen}

    def _saved(self) -> dict[str, Entry]:
        chosen = self.options.targets.saved(self._norms)
        return {name: self._norms[name] for name in chosen}


def _at(params: Params, entry: Entry) -> Any:
    return functools.reduce(lambda node, key: node[key], entry.path, params)


def _with(params: Params, path: Iterable[Any], value: Any) -> Params:
    """Returns a tree with another value at a path; the one that was given stays."""
    first, *rest = path
    return {**params, first: _with(params[first], rest, value) if rest else value}
