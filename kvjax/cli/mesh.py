"""`--mesh`: the devices that share weights and caches."""

import contextlib
import contextvars
from typing import Annotated, Any

import typer

from kvjax import parallel

# Of the command that runs, None for one device.
over_mesh: contextvars.ContextVar[Any] = contextvars.ContextVar("mesh", default=None)

MeshOption = Annotated[
    str | None,
    typer.Option(
        "--mesh",
        help="Devices that share weights and caches out, as tensor=4: by heads and by "
        "the width of the MLP; one device if left out.",
    ),
]
COMMANDS = ("generate", "score")  # that run over a mesh; each decodes one row


def check(given: str | None) -> None:
    """Raises ValueError for no mesh; where there are CPUs alone, makes as many of one.

    Before JAX looks for devices: afterwards there are those that there are.
    """
    import jax

    if given is None:
        return
    sizes = parallel.parse(given)
    if sizes.data > 1:
        raise ValueError(
            f"--mesh {given}: data={sizes.data} shares rows out, and there is 1: give "
            f"tensor={sizes.devices}."
        )
    with contextlib.suppress(RuntimeError):
        jax.config.update("jax_num_cpu_devices", sizes.devices)
