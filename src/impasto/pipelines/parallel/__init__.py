"""One image on several processes."""
