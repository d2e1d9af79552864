"""The costs of decoding: planned from shapes, and measured."""
