"""Programs that make the files this repository ships: prompt sets, the embedded model, tables of the documentation."""
