"""Training: data, recipes, the loop."""
