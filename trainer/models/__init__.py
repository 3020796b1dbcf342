"""Ready-made models, one module a family; each is a plain function or class over Keras."""
