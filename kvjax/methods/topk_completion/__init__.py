"""Top-K retrieval with linear-attention completion (arXiv:2604.05438)."""

from kvjax.methods.topk_completion.method import topk_completion as topk_completion
