"""Passes: efficiency papers as graph rewrites, and the analyses they read."""
