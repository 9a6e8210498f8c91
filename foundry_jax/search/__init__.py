"""The loop: contestants, the gate before training, their runs, the verdict, and what is promoted.

What only looks at runs and decides (verdict, measuring, comparing, the ledger, the lineage, the report) does not import
JAX; what builds or trains a model (gate, population, worker, probe, lr_finder) does.
"""
