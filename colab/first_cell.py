# @title Install what is missing, for the device that is here, and say what this runs on
import importlib.metadata
import importlib.util
import os
import pathlib
import platform
import shutil
import subprocess
import sys

# Where to install kvjax from: a folder, a wheel, or the address of a repository.
KVJAX = ""  # @param {type: "string"}
REPOSITORY = ""  # kvjax's own, if it has one

MODULES = ("kvjax", "models", "gguf", "grain", "huggingface_hub", "optax", "orbax")
EXTRAS = ("gguf", "hub", "train")
CUDA_13_DRIVER = 580  # the oldest that runs it
HELP = """\
kvjax is not installed, and this notebook does not lie in its repository. Either
 - set KVJAX, at the top of this cell, to the address of a repository, such as
   "https://github.com/OWNER/kvjax",
 - or upload a wheel or a checkout of kvjax, and set KVJAX to its path,
 - or install kvjax by pip, and restart the runtime.
Then run this cell again."""


class SetupError(Exception):
    """Ends a cell, with its message and without a traceback."""

    def _render_traceback_(self):
        return [str(self)]


def gpus():
    """Compute capability and driver of each NVIDIA GPU, as (8.0, 580)."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    query = [tool, "--query-gpu=compute_cap,driver_version", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True)
    lines = done.stdout.splitlines() if done.returncode == 0 else []
    rows = [line.split(",") for line in lines]
    return [(float(cap), int(driver.split(".")[0])) for cap, driver in rows]


def device(files=pathlib.Path("/dev")):
    """The flavour of jax for this machine: cuda13, cuda12, tpu, or "" for the CPU."""
    drivers = [driver for _, driver in gpus()]
    if drivers or (files / "nvidia0").exists():
        is_old = bool(drivers) and min(drivers) < CUDA_13_DRIVER
        return "cuda12" if is_old else "cuda13"
    has_tpu = (files / "accel0").exists() or any((files / "vfio").glob("[0-9]*"))
    return "tpu" if has_tpu else ""


def source(above=pathlib.Path("..")):
    """What to install kvjax from, as pip takes it: a path or an address."""
    if not KVJAX and (above / "pallas_kernels").is_dir():
        return str(above.resolve())
    place = KVJAX or REPOSITORY
    if not place:
        raise SetupError(HELP)
    path = pathlib.Path(place).expanduser()
    if path.exists():
        return str(path.resolve())
    if "://" not in place:
        raise SetupError(f"KVJAX = {place!r} is no file, no folder and no address.")
    is_plain = place.startswith("git+") or place.endswith(".whl")
    return place if is_plain else f"git+{place}"


def requirements(flavour, place):
    """What pip installs: kvjax with what the notebooks and this device need.

    All at once: a newer jax beside an older plugin leaves the accelerator unused.
    """
    extras = [*EXTRAS, *{"tpu": ["tpu"], "cuda13": ["cuda"]}.get(flavour, [])]
    if any(capability < 9 for capability, _ in gpus()):
        extras.append("triton")
    is_address = "://" in place
    name = (
        f"kvjax[{','.join(extras)}]" if is_address else f"{place}[{','.join(extras)}]"
    )
    kvjax = f"{name} @ {place}" if is_address else name
    return [kvjax, *(["jax[cuda12]"] if flavour == "cuda12" else [])]


def stale_plugins():
    """Plugins of another release than jaxlib: they would take the place of its own."""
    names = [f"jax-cuda{v}-{part}" for v in (12, 13) for part in ("plugin", "pjrt")]
    versions = {d.name: d.version for d in importlib.metadata.distributions()}
    return [
        n for n in names if versions.get(n, versions["jaxlib"]) != versions["jaxlib"]
    ]


def pip(*arguments):
    command = [sys.executable, "-m", "pip", *arguments]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        raise SetupError(
            f"{done.stderr.strip()}\n\nThis failed: pip {' '.join(arguments)}"
        )


def is_installed():
    """Whether kvjax is; a folder of that name, which can be imported too, is not."""
    return any(d.name == "kvjax" for d in importlib.metadata.distributions())


def install(flavour):
    if is_installed() and all(map(importlib.util.find_spec, MODULES)):
        return
    # What is installed, with all that it needs here; or from where it lies.
    place = "kvjax" if is_installed() and not KVJAX else source()
    pip("install", "-q", *requirements(flavour, place))
    importlib.invalidate_caches()
    if stale := stale_plugins():
        pip("uninstall", "-q", "-y", *stale)


def advice(flavour, backend, version):
    """What to do about a backend that is not the accelerator's; nothing if it is."""
    if backend != "cpu":
        return ""
    if not flavour or os.environ.get("JAX_PLATFORMS") == "cpu":
        return (
            "NO ACCELERATOR. Everything runs, on the CPU, at small sizes: speeds mean\n"
            "nothing here. In Colab: Runtime, Change runtime type, TPU or GPU."
        )
    return (
        "AN ACCELERATOR IS HERE, but jax does not use it: its plugin is missing or\n"
        "too old. Restart the runtime and run this cell again; if it still says so:\n"
        f"pip install -U 'jax[{flavour}]=={version}', and restart."
    )


if __name__ == "__main__":
    flavour = device()
    install(flavour)

    import jax

    import kvjax

    print(f"kvjax {kvjax.__version__}, jax {jax.__version__}", end=", ")
    print(f"Python {platform.python_version()}, {jax.devices()}")
    if words := advice(flavour, jax.default_backend(), jax.__version__):
        print("=" * 78, words, "=" * 78, sep="\n")
