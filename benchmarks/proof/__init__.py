"""The proof: every method on every workload, scored in one table.

``training`` runs one method once, ``drivers`` make this library's runs, ``contenders`` are the
methods, ``searches`` choose among runs, ``scoring`` compares records, ``rendering`` writes
``RESULTS.md``; ``benchmarks.run`` is the command.
"""
