"""Passes that give a graph states: what earlier calls computed and later ones need."""

from . import insert_kv_cache, keep_last, page_kv_cache
from .insert_kv_cache import Cache, InsertKvCache, cache_of

__all__ = ["Cache", "InsertKvCache", "cache_of", "insert_kv_cache", "keep_last", "page_kv_cache"]
