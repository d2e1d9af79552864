"""What decoding costs: planned from shapes, and measured."""
