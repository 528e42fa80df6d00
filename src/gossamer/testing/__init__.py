"""Contract laws: what every system of a kind must do, tried on tiny Hugging Face models; usable on anybody's system.

    for finding in check_system("my_adapter"):        # a registered name, a class, or the path of a file
        print(finding)

A law is a function ``check_*(entry, bench)`` that raises where it is broken. Laws for all systems stand in
:mod:`gossamer.testing.universal`, those of a kind in the module of its name.
"""

from gossamer.testing.bench import FAMILIES, Bench
from gossamer.testing.running import Finding, Law, check_law, check_system, entry_of, laws

__all__ = ["FAMILIES", "Bench", "Finding", "Law", "check_law", "check_system", "entry_of", "laws"]
