"""SubGen (arXiv:2402.06082)."""

from kvjax.methods.subgen.method import subgen as subgen
