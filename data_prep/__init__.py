"""Shard sets from images: build, verify, repair, index, demo (``python -m data_prep``, also ``caco-shards``).

``sources`` (over ``tar``, ``imagenet``, ``parquet``) says where images come from, ``build`` what
is made of them, ``jobs``, ``shard`` and ``images`` make it, ``destination`` keeps what is finished, ``progress`` shows
it. ``verify``, ``repair``, ``index``, ``demo`` are the other commands; ``checksums`` gives older sets those of samples.

The room uses the data room of caco_scale (folders, shard format, stores, object store), its errors, atomic files, flags
and signals.
caco_scale knows nothing of it, except where the demo's data is drawn and the loader is measured.
"""
