"""Imported last by a process that others are forked from: what it has loaded stays as it is.

The garbage collector would visit a million objects of the imports in every fork, and by that copy their pages.
"""

import gc

gc.collect()
gc.freeze()
