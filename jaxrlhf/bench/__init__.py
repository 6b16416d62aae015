"""How fast the steps are, beside their peers and beside the arithmetic that they cannot do without."""
