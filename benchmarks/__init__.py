"""How fast backsolve is beside hand-written code and other packages, and how right each of them is.

`make bench` measures everything and writes `benchmarks/results/`; `python -m benchmarks --help` lists what can be
chosen. A row is a `Case`: one problem of one size and what is computed of it. `workloads.py` is the table of rows,
`contestants/` the table of columns.
"""
