"""The engine of one model: the stages of an image, what steps cost, which images share them, and its process."""
