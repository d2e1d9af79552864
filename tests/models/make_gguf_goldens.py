"""Writes goldens/gguf_splits.json: how each pattern cuts texts, by another engine.

The patterns are those of transformers, the engine is the module `regex`; ours go
through the one in tokenizers. Run from the repository root, with both installed:

    python tests/models/make_gguf_goldens.py
"""

import json
from pathlib import Path

GOLDENS = Path(__file__).parent / "goldens" / "gguf_splits.json"
PRES = ("llama-bpe", "qwen2", "qwen35", "tekken", "gpt-4o")
TEXTS = (
    "Hello, world! It's 12345 o'clock; I'LL wait.\n\n  Indented\tby a tab",
    "def f(x):\n    return x**2  # 3.14159 and 0x1F\r\n\r\n\r\n    pass   \n",
    "   leading, trailing   ",
    "camelCaseWord HTTPServer XMLHttpRequest's iOS'RE McDonald'Ve",
    "path/to//file\n/and/more/\n\n/\n",
    "naïve café déjà-vu — Straße ǅungla ʰʷ ªº",
    "combining: e\u0301 a\u0308o\u0302 n\u0303 \u0301alone",
    "हिन्दी में लिखा ราคา กำลังใจ தமிழ்",
    "日本語テキスト、漢字と仮名。中文文本\uff0c没有空格\uff01한국어 문장",
    "Ⅻ ½ ²³ ٣٤٥٦٧ १२३४ \U0001d7dc\U0001d7da",
    "emoji 👩‍👩‍👧 🇩🇪🇫🇷 ✌🏽!!! ???\u00a0\u2003spaces",
    "'s't're've'm'll'd 'S 'T \u017f'\u017f don\u2019t",
    "a\nb\r\nc\rd\n \n \n  e\n\t\n",
    "$$$ ... ---===+++ <<>> {}[]()\n#!/usr/bin/env",
)


def main():
    import regex
    from transformers.integrations.gguf import gguf_tokenizer_mapping as theirs

    splits = {}
    for pre in PRES:
        pattern = regex.compile(theirs.GGUF_PRE_TOKENIZER_SPLITS[pre])
        splits[pre] = []
        for text in TEXTS:
            pieces = [match.group() for match in pattern.finditer(text)]
            assert "".join(pieces) == text, (pre, text)
            splits[pre].append(pieces)
    text = json.dumps({"texts": TEXTS, "splits": splits}, ensure_ascii=True, indent=0)
    GOLDENS.write_text(text + "\n")


if __name__ == "__main__":
    main()
