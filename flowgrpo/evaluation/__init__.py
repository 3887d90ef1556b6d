"""What is measured and shown: held-out scores, comparison grids, credit inspection, and the report of a run."""
