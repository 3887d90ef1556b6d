"""The types that pass between the other packages, and the prompts.

Types: prompts and groups (``prompts``), actions, candidates and experience (``experience``). Prompts:
reading prompt files and datasets (``prompt_files``), the order in which they are trained on
(``prompt_sets``), reading and encoding pictures (``pictures``). ``files`` writes files so that a killed
process leaves them whole."""
