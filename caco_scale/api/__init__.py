"""The front door for Python: a run, a loader and a backbone, each in one call, as ``import caco_scale`` gives them.

    run.py         pretrain(recipe, **flags) -> Run; read_metrics(run)
    loader.py      batches(data, ...) -> Batches of augmented views
    backbone.py    load_backbone(run_or_weights) -> Backbone
    finish.py      what a finished run ends with: backbone, model card, report, the next commands

It may import every room but the commands and ``data_prep``; none imports it. A user's mistake is a
:class:`~caco_scale.errors.UserError` of one line; nothing here ends the process.
"""
