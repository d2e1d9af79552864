"""The streams of `kvjax.testing`, under the name that the tests drive methods by."""

from kvjax.testing.oracle import rotate as rotate
from kvjax.testing.streams import *  # noqa: F403
