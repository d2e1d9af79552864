"""For methods of your own: does one keep what every method promises?

:func:`check_method` runs the contract that the methods of kvjax are tested by. What it
is made of, random streams and float64 oracles, is in `streams` and `oracle`.
"""

from kvjax.testing.contract import check_method as check_method
from kvjax.testing.streams import ContractError as ContractError
