"""The tensors of a checkpoint with an adapter merged into them, as they are read.

An adapter's names are those of the checkpoint itself: it comes before anything that
splits, folds, casts or packs.
"""

import numpy as np

from models.llama.adapters import CONFIG, Adapter
from models.llama.tensors import Tensors, few

_MATRICES = ("_proj", "lm_head")  # ends of their modules' names


def merge(tensors: Tensors, adapter: Adapter) -> Tensors:
    """Returns tensors in which W + scale * B A stands for W, and norms are replaced.

    Sums are float64, rounded when they are cast to the model's dtype. Integers that a
    file stores are no longer those of any matrix: `stored` is None.

    Raises:
        ValueError: if the adapter is for another model; from `read` too, which knows
            the shapes.
    """
    _check_names(tensors, adapter)
    factors = {f"{name}.weight": one for name, one in adapter.factors.items()}
    norms = {f"{name}.weight": one for name, one in adapter.replaced.items()}

    def read(name: str) -> np.ndarray:
        raw = tensors.read(name)
        new = factors.get(name, norms.get(name))
        if new is None:
            return raw
        if raw.shape != new.shape:
            raise ValueError(
                f"{adapter.folder} was made for {adapter.made_for}, in which {name} is "
                f"{new.shape}: that of {tensors.source} is {raw.shape}."
            )
        if name in norms:
            return norms[name]
        down, up, scale = factors[name]
        return raw.astype(np.float64) + scale * (
            up.astype(np.float64) @ down.astype(np.float64)
        )

    return tensors._replace(read=read, stored=None)


def _check_names(tensors: Tensors, adapter: Adapter) -> None:
    """Raises ValueError unless all adapted modules are there, and all targets adapted.

    An adapter of a model of fewer layers would be taken for one of these otherwise.
    """
    modules = [
        name.removesuffix(".weight") for name in tensors.files if ".weight" in name
    ]
    of_adapter = {*adapter.factors, *adapter.replaced}
    if unknown := of_adapter - {*modules}:
        raise ValueError(
            f"{adapter.folder} was made for {adapter.made_for}: {tensors.source} has "
            f"no {few(unknown)}."
        )
    targets = adapter.targets
    matrices = [name for name in modules if name.endswith(_MATRICES)]
    wanted = {*targets.adapted(matrices)}
    if targets.modules_to_save:
        wanted |= {*targets.saved(name for name in modules if name.endswith("norm"))}
    if missing := wanted - of_adapter:
        raise ValueError(
            f"{adapter.folder} was made for {adapter.made_for}: it has nothing for "
            f"{few(missing)} of {tensors.source}, which its {CONFIG} asks for."
        )
