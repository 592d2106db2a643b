"""Mutants: the code, broken on purpose in one place. Each must turn the tests red that are named beside it.

`make mutants` runs them all, `python -m tests.mutants WORD ...` those whose name contains one of the words. table.py
holds the patches, observe.py runs tests and writes down how they failed.
"""
