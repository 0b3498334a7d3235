"""Recipes: files that describe one training run, and the validated values read from them."""
