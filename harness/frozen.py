"""Imported last by a process before it forks others: moves all loaded objects out of the garbage collector's reach.

Otherwise the collector would visit a million objects of the imports in every fork, and thereby copy their pages.
"""

import gc

gc.collect()
gc.freeze()
