"""What a policy's outputs show: generalisation, diversity, their intervals and the report. Needs no JAX."""
