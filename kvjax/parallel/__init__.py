"""More than one device: a mesh, and any method over it, unchanged."""

from kvjax.parallel.axes import shapes_of as shapes_of
from kvjax.parallel.exchange import Exchange as Exchange
from kvjax.parallel.exchange import Kind as Kind
from kvjax.parallel.exchange import compiled as compiled
from kvjax.parallel.exchange import exchanged as exchanged
from kvjax.parallel.mesh import AXES as AXES
from kvjax.parallel.mesh import AnyMesh as AnyMesh
from kvjax.parallel.mesh import Sizes as Sizes
from kvjax.parallel.mesh import beside as beside
from kvjax.parallel.mesh import everywhere as everywhere
from kvjax.parallel.mesh import fitted as fitted
from kvjax.parallel.mesh import imagined as imagined
from kvjax.parallel.mesh import make as make
from kvjax.parallel.mesh import of as of
from kvjax.parallel.mesh import parse as parse
from kvjax.parallel.mesh import ways as ways
from kvjax.parallel.mesh import whole as whole
from kvjax.parallel.spread import Spread as Spread
from kvjax.parallel.spread import in_parts as in_parts
from kvjax.parallel.spread import inside as inside
from kvjax.parallel.spread import local as local
from kvjax.parallel.spread import of_state as of_state
from kvjax.parallel.spread import over as over
from kvjax.parallel.spread import share_of as share_of
