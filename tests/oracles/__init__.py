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
from oracles.operations import *  # noqa: F403
from oracles.papers import *  # noqa: F403
