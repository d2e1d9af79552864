"""Writes goldens/windows.json: the sliding window in force, by transformers' own rules.

Its configuration classes say which layers slide; Mistral's and Phi-3's models slide in
all layers that have a window, and do not look. Run from the repository root:

    PYTHONPATH=tests/models python tests/models/make_windows.py
"""

import itertools
import json
from pathlib import Path

from checkpoints import BASE

GOLDENS = Path(__file__).parent / "goldens" / "windows.json"
SLIDING, FULL = "sliding_attention", "full_attention"
FAMILIES = ("mistral", "ministral", "phi3", "qwen2", "qwen3", "smollm3")
WITH_TEXT = {
    "mistral3": "mistral",
    "qwen2_vl": "qwen2_vl_text",
    "qwen2_5_vl": "qwen2_5_vl_text",
}
UNASKED = ("mistral", "phi3")  # models that do not look at layer_types
USED = ({}, {"use_sliding_window": True}, {"use_sliding_window": False})
WINDOWS = ({}, {"sliding_window": 48}, {"sliding_window": None})
LAYERS = (
    {},
    *({"max_window_layers": count} for count in (0, 1, 2, 28)),
    *({"layer_types": kinds} for kinds in ([FULL, SLIDING], [FULL, FULL])),
    {"layer_types": [SLIDING, SLIDING], "max_window_layers": 2},
    {"layer_types": [FULL, FULL], "max_window_layers": 0},
    {"layer_types": None},
)
POSITIONS = 9000  # beyond every default of a window


def config(family: str, keys: dict) -> dict:
    """A `config.json` of the family with keys that say something about windows."""
    text = BASE | {"max_position_embeddings": POSITIONS, "pad_token_id": None} | keys
    del text["model_type"]
    if family == "smollm3":
        text["no_rope_layers"] = [1, 0]
    if family in WITH_TEXT:
        inner = text | {"model_type": WITH_TEXT[family]}
        return {"model_type": family, "text_config": inner}
    return text | {"model_type": family}


def window_of(family: str, keys: dict) -> int | str | None:
    """The window of the layers that slide; None if none does."""
    import transformers

    given = config(family, keys)
    kind = given.pop("model_type")
    theirs = transformers.AutoConfig.for_model(kind, **given).get_text_config()
    kinds = getattr(theirs, "layer_types", None)
    if theirs.model_type in UNASKED:
        kinds = None
    if kinds is not None and SLIDING not in kinds:
        return None
    if kinds is not None and theirs.sliding_window is None:
        return "refused"  # layers that slide in no window
    return theirs.sliding_window


def main():
    rows = []
    for family in (*FAMILIES, *WITH_TEXT):
        for parts in itertools.product(USED, WINDOWS, LAYERS):
            keys = {key: value for part in parts for key, value in part.items()}
            rows.append([family, keys, window_of(family, keys)])
    lines = ",\n".join(json.dumps(row) for row in rows)
    GOLDENS.write_text(f"[\n{lines}\n]\n", encoding="utf-8")


if __name__ == "__main__":
    main()
