"""Thousands of prompts from a file, to images and a manifest."""
