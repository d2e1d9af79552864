"""A file of measured entries that every call of a benchmark adds to."""

import json
import os

import jax

from kvjax import files


def add(path, entry):
    """Adds an entry to a JSON file, made if need be, beside what machine measured."""
    document = {"entries": []}
    if path.exists():
        document = json.loads(path.read_text(encoding="utf-8"))
    about = {
        "jax": jax.__version__,
        "cores": os.cpu_count(),
        "device": jax.devices()[0].device_kind,
    }
    document = about | document
    document["entries"].append(entry)
    text = json.dumps(files.json_ready(document), indent=2)
    files.write_text(path, text + "\n")
