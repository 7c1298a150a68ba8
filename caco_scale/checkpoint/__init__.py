"""Checkpoints of a run: atomic, asynchronous, and the same file for every strategy and world size.

A checkpoint is a folder ``checkpoints/step_XXXXXXXX``:

    values.json         step, config, fingerprint, bank pointer, ...; shapes of the tensors, file sizes
    .metadata           torch.distributed.checkpoint's table of contents: which block lies where
    __<rank>_0.distcp   the blocks that one rank wrote
    SHA256SUMS          a hash of each of these files, written last, checked before anything of one is parsed

It is written as ``step_XXXXXXXX.tmp``, every file and the folder are flushed to the disk, and rank 0
renames it last: ``step_XXXXXXXX`` is complete or absent, whatever is killed when.

**The layout knows no strategy.** A tensor is stored under a stable name as a global array of which any rank
may give any contiguous blocks, so what R ranks wrote R' ranks can read:

    query.<parameter>  key.<parameter>              flat: (number of elements,), these five alike
    query_buffer.<buffer>  key_buffer.<buffer>
    optimizer.<parameter>/<slot>
    bank.rows  bank.velocity  (K, D)                bank.assignments  (K,)

A replicated tensor (DDP) is given as it is and written once, whole, as its flat view; the ranks share that
work. A partitioned optimizer (ZeRO, FSDP2) gives the flat ranges it owns of the same names as
:class:`~caco_scale.checkpoint.state.Block`, several to a tensor if need be; the original shape goes to
``values.json``.

    state.py      what a state is                 folder.py     names, what is complete, how a folder appears
    write.py      saving, in the background       read.py       loading, by any number of ranks
    values.py     what values.json may say        sums.py       SHA256SUMS
    contents.py   the state of a training run: the one file here that knows a strategy, an optimizer and a bank
    resume.py     which checkpoint a start goes on from, and whether its config may
    together.py   an error of one rank is an error of all

What this room may know: ``distributed`` (collectives, partitions), ``run`` (patience with a disk; write.py alone),
``optim`` (state by name; contents.py alone) and ``config`` (what may differ at a resume; resume.py alone). Importing
the room itself imports nothing.
"""
