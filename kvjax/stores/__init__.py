"""The stores of keys and values: every token in slots or pages, or kept ones."""
