"""Images and their order: shards and folders, object stores and caches, decoding, views, batches.

From an image to the step: ``store`` (where it lies) -> ``order`` (who is next) -> ``pipeline`` (decoded, cropped) ->
``loader`` (a batch) -> ``to_device`` -> ``augment``. ``folders`` and ``shards`` say what a set is; ``object_store``,
``credentials``, ``cache``, ``threads`` bring it from elsewhere.

The room knows errors, how long processes wait for each other (distributed) and how workers hear signals (run). It knows
nothing of models, training, evaluation, or how shards are built (data_prep).
"""
