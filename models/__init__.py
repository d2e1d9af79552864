"""Flax decoders. They know `kvjax.interface` and `kvjax.rope`, and no method."""
