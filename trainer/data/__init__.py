"""Where examples come from (one module per source) and in which order they are read.

`source` is the interface, `arrays`, `digits` and `idx` are sources, `order` computes which records
a step sees, `augment` holds random transformations, and `pipeline` makes batches out of all that.
"""
