"""CoIN's JSON from the official releases: `python -m data.prepare --task GQA --source DIR --root DATA_ROOT`.

One file a task says which official files it reads and what becomes of them; `source.py` reads, `write.py` writes.
"""
