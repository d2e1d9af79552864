"""A method, or the spec string of one: what users may give where a method is wanted."""

from kvjax import registry
from kvjax.interface import Method


def as_method(method: Method | str) -> Method:
    """Returns the method that a spec string such as `quest:budget=128` describes.

    The same string gives the same object, so that compiled code is kept per string.

    Raises:
        TypeError: if it is neither.
        ValueError: as :func:`kvjax.registry.parse`.
    """
    if isinstance(method, str):
        return registry.parse(method)
    if not isinstance(method, Method):
        raise TypeError(
            f"method={method!r} must be a kvjax.Method, or text such as "
            "'quest:budget=128'."
        )
    return method
