"""Runnable guides for authors, and the models that effc is shown on."""
