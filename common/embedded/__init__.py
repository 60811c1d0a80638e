"""The procedural test bed: movements, captions for them, and a check of one against the other.

Nobody has to enter this room. datasets.py asks it for clips, evaluate.py asks its oracle for verdicts.
"""
