"""Do the methods still find, predict and agree? Tasks, statistics and the comparison.

A model and its methods are arguments everywhere: nothing here imports one.
"""
