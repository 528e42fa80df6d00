"""What there is to work on, offline from the first minute.

``models`` names checkpoints, ``corpora`` reads text that installed packages ship, ``nursery`` trains small models from
scratch and keeps them.
"""
