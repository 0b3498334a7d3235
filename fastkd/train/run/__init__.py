"""A run: training from a recipe, recorded in a folder from which it can be resumed."""
