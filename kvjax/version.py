"""The version of kvjax: of the package, and of what is cited."""

__version__ = "0.1.0"
