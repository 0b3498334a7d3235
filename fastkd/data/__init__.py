"""The data sets of recipes, as batches that are the same for every rank and after every restart."""
