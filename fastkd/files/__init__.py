"""Reading and writing files safely: regular files only, whole or not at all, checked by SHA-256."""
