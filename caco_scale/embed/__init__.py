"""Features of a whole set in one file, and what is done with them: nearest neighbours, near-duplicates.

``extract.py`` computes features part by part, ``parts.py`` keeps the parts that a killed extraction leaves behind;
``files.py`` writes and reads the file (parquet, npz, safetensors). ``neighbours.py`` and ``duplicates.py`` are exact
and look at a file block by block; ``show.py`` makes their tables and pages of pictures, ``run.progress`` says how far
what takes long is.
Of other rooms it knows ``evaluate`` (encoders, features, exact cosines), ``weights``, ``method`` (a ViT's patches),
``data``, ``distributed`` (collectives), ``run`` (signals) and ``errors``; of ``report`` the frame of a page.
"""
