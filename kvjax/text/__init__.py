"""Text and tokens: what a tokenizer adds, and text that comes token by token."""
