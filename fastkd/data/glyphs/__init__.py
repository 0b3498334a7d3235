"""Characters rendered from font files, as a data set."""
