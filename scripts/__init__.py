"""Programs that make files of this repository: prompt sets, the embedded model, tables of the docs.

They are not part of the installed package. ``scripts/README.md`` lists each with its command.
"""
