"""The commands of `fastkd` that train or work on runs."""
