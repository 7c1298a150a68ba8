"""Images and their order: shards and folders, object stores and caches, decoding, views, batches.

From an image to the step: ``store`` (where it lies) -> ``order``, ``mixed_order`` (who is next) -> ``pipeline``
(decoded, cropped) -> ``loader`` (a batch; ``workers`` from a ``fork_server``) -> ``to_device`` -> ``augment``;
``views`` decodes and cuts, ``in_memory`` keeps what is decoded.

What a set is: ``addresses`` (where), ``scan``, ``folders`` and ``splits`` (files and folders), ``listed_files`` (which
a run is of), ``shards`` and ``shard_index`` (the format; ``index_checks``), ``samples`` and ``tars`` (of a tar),
``labels``. What brings it: ``small_files`` (manifests and indexes), ``object_store`` (over ``object_client``,
``credentials``), ``cache``, ``own_files``, ``threads``, ``counters``.

The room knows errors, how many processes share a machine and how long they wait for each other (distributed), how
workers hear signals and what they leave when they are killed (run). It knows nothing of models, training, evaluation,
or how shards are built (data_prep).
"""
