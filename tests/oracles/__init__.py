"""Every method again, in float64 NumPy, one row and one token at a time.

Written from the definitions and importing nothing of ours: a mistake has to be made
twice, in two ways, to go unnoticed. Speed does not matter here, being obvious does.
"""

from oracles.attention import *  # noqa: F403
from oracles.baselines import *  # noqa: F403
from oracles.budgets import decode_eviction as decode_eviction
from oracles.budgets import duo as duo
from oracles.budgets import head_budgets as head_budgets
from oracles.chosen_once import *  # noqa: F403
from oracles.completion import topk_completion as topk_completion
from oracles.critiprefill import critiprefill as critiprefill
from oracles.hip import Hip as Hip
from oracles.hip import hip as hip
from oracles.hip import in_stages as in_stages
from oracles.hip import tree_search as tree_search
from oracles.hip import walk as walk
from oracles.operations import *  # noqa: F403
from oracles.papers import *  # noqa: F403
from oracles.squeezed import Squeezed as Squeezed
from oracles.squeezed import kmeans as kmeans
from oracles.squeezed import squeezed as squeezed
from oracles.subgen import subgen_centres as subgen_centres
from oracles.subgen import subgen_stream as subgen_stream
