"""Shard sets from images: build, verify, demo (``python -m data_prep``, also ``caco-shards``)."""
