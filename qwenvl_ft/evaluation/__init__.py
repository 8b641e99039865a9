"""How good a model is: it is asked by generation, and its answers are compared."""
